"""Flow policy optimisation (FPO): policy gradients for a flow model without its likelihood.

McAllister et al. 2025 (arXiv 2507.21053): PPO with the likelihood ratio replaced by
``r = exp(L_old - L)``, where ``L`` is the flow-matching loss of the action that was taken,
averaged over pairs ``(t_i, eps_i)`` that are drawn once per action and kept. Both losses see the
same pairs, so at the first step ``r = 1``. The action is the solution of the ODE from Gaussian
noise, and the environment receives its tanh.

The loss of a pair is that of the noise estimate, as in the authors' experiments: with
``x_t = (1 - t) eps + t a`` it is ``t^2 mean_d (v - (a - eps))^2`` (their time runs backwards),
which is zero at ``t = 0``; ``agent.loss=velocity`` leaves the ``t^2`` out. Times are those at
which the solver evaluates the network.

Deviations: actor and critic have an optimiser each, and gradients are clipped, where the authors
clip none; observation statistics are the same in rollout and optimisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from genpol import parallel
from genpol import settings as check
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.on_policy import DenoisingAgent, DenoisingSettings, Evaluation, Likelihood, Rows
from genpol.policies.flow import FlowPolicy


@dataclass(frozen=True, kw_only=True)
class Settings(DenoisingSettings):
    """Hyper-parameters of FPO."""

    pairs: int = 8
    """Draws of time and noise for each action."""
    loss: str = "epsilon"
    """Whose error makes the ratio: that of the noise (`epsilon`), or of the `velocity`."""
    ratio: str = "mean"
    """One ratio of the `mean` loss, or one of each `pair`, whose surrogates are averaged."""
    clip: float = 0.05
    """Likelihood ratios are clipped to 1 plus or minus this."""
    gamma: float = 0.995
    """Discount per decision."""
    learning_rate: float = 3e-4
    """Adam step size of the actor."""
    critic_learning_rate: float = 3e-4
    """Adam step size of the critic."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.at_least("agent.pairs", self.pairs, 1)
        check.one_of("agent.loss", self.loss, ("epsilon", "velocity"))
        check.one_of("agent.ratio", self.ratio, ("mean", "pair"))
        if self.surrogate == "mdpo":
            raise ConfigError(
                "agent.surrogate = 'mdpo': needs a divergence, which a flow does not have; use "
                "agent=dppo, whose chain has one"
            )


class FlowMatchingLikelihood(Likelihood):
    """Minus the flow-matching loss of an action, in the place of its log-density.

    Args:
        actor: The flow.
        settings: Number of pairs, and their loss.
        generator: Source of the pairs.
    """

    def __init__(self, actor: FlowPolicy, settings: Settings, generator: torch.Generator) -> None:
        self.actor = actor
        self.settings = settings
        self._generator = generator

    def keep(self, batch: TensorDict, observation: Tensor) -> dict[str, Tensor]:
        """Return actions, the pairs drawn for them, and minus their losses as they are now."""
        action = batch["decoded"]
        shape = (*action.shape[:-1], self.settings.pairs)
        noise = torch.empty(*shape, action.shape[-1], device=action.device)
        generator = parallel.branch(self._generator)
        noise.normal_(generator=generator)
        steps = self.settings.solver_steps
        index = torch.randint(steps, (*shape, 1), generator=generator, device=generator.device)
        kept = {
            "observation_raw": batch["observation"],
            "decoded": action,
            "noise": noise,
            "time": (index / steps).to(action),
        }
        return kept | {"log_prob": self.log_prob(self.actor, kept)}

    def evaluate(self, rows: Rows) -> Evaluation:
        """See :class:`~genpol.on_policy.likelihood.Likelihood`."""
        log_prob = self.log_prob(self.actor, rows)
        return Evaluation(
            log_prob=log_prob,
            regulariser=log_prob.new_zeros(()),
            divergence=lambda: torch.zeros_like(log_prob),
            metrics={"policy/flow_loss": -log_prob.detach().mean()},
        )

    def log_prob(self, actor: nn.Module, rows: Rows) -> Tensor:
        """Return minus the loss, ``[...]``, or ``[..., pairs]`` with a ratio for each pair."""
        assert isinstance(actor, FlowPolicy)
        time, noise = rows["time"], rows["noise"]
        action = rows["decoded"].unsqueeze(-2)
        velocity = actor.velocity(
            rows["observation_raw"].unsqueeze(-2), torch.lerp(noise, action, time), time
        )
        error = (velocity - (action - noise)).square().mean(-1)
        if self.settings.loss == "epsilon":
            error = time.squeeze(-1).square() * error
        return -error if self.settings.ratio == "pair" else -error.mean(-1)


class FPO(DenoisingAgent):
    """Flow policy optimisation."""

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        actor = FlowPolicy(
            specs.observation_dim,
            specs.action_dim,
            settings.actor_hidden,
            num_steps=settings.solver_steps,
            generator=generator,
        )
        super().__init__(
            settings,
            specs,
            actor=actor,
            likelihood=FlowMatchingLikelihood(actor, settings, generator),
            generator=generator,
        )


AGENT = FPO
