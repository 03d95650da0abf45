"""Policy gradients with a memory: one gradient per rollout, collected where the estimator wants it.

What :mod:`agents.npg_igt <genpol.agents.npg_igt>` and :mod:`agents.harpg <genpol.agents.harpg>`
share. The loss of a rollout with N steps that count is ``-1/N sum_i sum_t A_t log pi(a_t | s_t)``
over its *trajectories* i: the pieces of episodes that lie in it. An episode that goes on in the
next rollout counts there as another trajectory, whose start is as good as given.

* Advantages come from generalised advantage estimation with a critic. As a baseline it biases
  neither gradient nor Hessian; as the value behind the end of a piece, and through
  ``gae_lambda < 1``, it does, since its own dependence on the policy is left out. Long rollouts and
  a large ``gae_lambda`` reduce that.
* They are standardised over the rollout. Subtracting their mean is one more baseline. Dividing by
  their deviation makes the momentum a mean of gradients of slightly different losses; that differs
  from rollout to rollout far less than the gradient itself, and step sizes come to mean the same in
  every task. ``normalize_advantage=false`` leaves both out, as in the paper.
* The sum over steps is divided by their number, not by that of trajectories, which itself depends
  on the policy where episodes can fail.
* The observation statistics move with every rollout, and what is remembered of earlier gradients
  does not follow them; their change fades as 1 / iteration.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.envs import ExplorationType, exploration_type

from genpol import settings as check
from genpol.agent import Agent, Specs
from genpol.errors import ConfigError
from genpol.objectives.advantages import normalize_advantage
from genpol.objectives.gradient_estimators import HARPG, NPGIGT, Trajectories
from genpol.on_policy.actors import DecodedPolicy, Encoder
from genpol.on_policy.learner import OnPolicyLearner
from genpol.on_policy.likelihood import LatentLikelihood, Rows
from genpol.on_policy.settings import GaussianSettings
from genpol.policies.latent import IdentityDecoder


@dataclass(frozen=True, kw_only=True)
class PolicyGradientSettings:
    """Hyper-parameters of agents that take one gradient per rollout."""

    rollout_steps: int = 64
    """Actions of every environment in one rollout; over all environments, the paper takes 1e3 to
    1e4."""
    step_size: float = 0.1
    """Length of the policy's first step (gamma_0); it decays as 2 / (t + 2)."""
    gradient_weight: float = 1.0
    """Weight of a new gradient against those before (eta_0), before it decays with t."""
    per_layer: bool = False
    """Whether steps are normalised in each weight and bias by itself; suits deep networks."""
    gamma: float = 0.99
    """Discount per decision."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation."""
    normalize_advantage: bool = True
    """Whether advantages are standardised over the rollout."""
    reward_weights: list[float] = field(default_factory=list)
    """Weight of each term of the reward; empty for 1 each."""
    reward_scale: float = 0.1
    """Rewards are multiplied by this before the critic sees them."""
    critic_epochs: int = 4
    """The critic's passes over each rollout."""
    critic_minibatches: int = 16
    """The critic's optimiser steps per pass."""
    critic_learning_rate: float = 1e-3
    """Adam step size of the critic."""
    max_grad_norm: float = 0.5
    """The critic's gradient is clipped to this norm."""
    nonfinite_patience: int = 10
    """Non-finite losses of the critic in a row that stop the run."""
    actor_hidden: list[int] = field(default_factory=lambda: [64, 64])
    """Widths of the actor's hidden layers."""
    critic_hidden: list[int] = field(default_factory=lambda: [64, 64])
    """Widths of the critic's hidden layers."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.positive("agent.step_size", self.step_size)
        check.positive("agent.gradient_weight", self.gradient_weight)
        check.within("agent.gradient_weight", self.gradient_weight, 0.0, 1.0)
        for name in ("critic_epochs", "critic_minibatches"):
            check.at_least(f"agent.{name}", getattr(self, name), 1)
        self.shared()  # checks the others

    def shared(self) -> GaussianSettings:
        """Return what networks, credit and critic read; the rest of it has no effect here."""
        return GaussianSettings(
            rollout_steps=self.rollout_steps,
            epochs=self.critic_epochs,
            minibatches=self.critic_minibatches,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            reward_weights=self.reward_weights,
            reward_scale=self.reward_scale,
            critic_learning_rate=self.critic_learning_rate,
            max_grad_norm=self.max_grad_norm,
            nonfinite_patience=self.nonfinite_patience,
            actor_hidden=self.actor_hidden,
            critic_hidden=self.critic_hidden,
            prior="none",
        )

    def frames_per_batch(self, specs: Specs) -> int:
        """Return the actions in one rollout of all environments.

        Raises:
            ConfigError: If they do not fill the critic's minibatches.
        """
        frames = self.rollout_steps * specs.num_envs
        if frames < self.critic_minibatches:
            raise ConfigError(
                f"agent.critic_minibatches = {self.critic_minibatches}: a rollout has only "
                f"{frames} rows (agent.rollout_steps x num_envs); lower it or raise one of those"
            )
        return frames


class ExploringEncoder(Encoder):
    """An encoder that explores with other parameters than those that it has learned.

    ``actor`` holds theta_t, which acts where nothing is explored: in evaluation, and in what users
    make of the policy. ``explorer`` acts in rollouts, and no gradient reaches it. They share the
    observation statistics.

    Arguments are those of :class:`~genpol.on_policy.Encoder`.
    """

    def __init__(
        self,
        observation_dim: int,
        latent_dim: int,
        settings: GaussianSettings,
        *,
        generator: torch.Generator,
        critic_observation_dim: int = 0,
    ) -> None:
        super().__init__(
            observation_dim,
            latent_dim,
            settings,
            generator=generator,
            init=settings.encoder_init,
            critic_observation_dim=critic_observation_dim,
        )
        self.explorer = copy.deepcopy(self.actor).requires_grad_(False)
        self.explorer.normalizer = self.normalizer

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation ``[..., A]`` at raw observations ``[..., d]``."""
        explores = exploration_type() in (ExplorationType.RANDOM, None)
        mean, scale = (self.explorer if explores else self.actor)(observation)
        return mean, scale

    def explore_here(self) -> None:
        """Explore with the parameters that the actor has now."""
        self.explorer.net.load_state_dict(self.actor.net.state_dict())


def pieces(done: Tensor) -> Tensor:
    """Number the pieces of episodes in a rollout.

    Args:
        done: Whether an episode ended with this step, ``[num_envs, time]``.

    Returns:
        The piece ``0, 1, ...`` that each step belongs to, environment by environment,
        ``[num_envs, time]``.
    """
    starts = torch.ones_like(done)
    starts[:, 1:] = done[:, :-1]
    return (starts.flatten().cumsum(0) - 1).view_as(done)


def sums_over_pieces(values: Tensor, piece: Tensor) -> Tensor:
    """Sum values ``[B]`` over each piece ``[P]``.

    They are laid out before they are summed: ``index_add`` adds in any order on a GPU, so that a
    run could not be repeated to the bit.

    Args:
        values: One for each step.
        piece: The piece of each step, ``[B]``, never decreasing.
    """
    lengths = torch.bincount(piece)
    place = torch.arange(len(piece), device=piece.device) - (lengths.cumsum(0) - lengths)[piece]
    table = values.new_zeros(len(lengths), int(lengths.max()))
    return table.index_put((piece, place), values).sum(-1)


class PieceLikelihood(LatentLikelihood):
    """A Gaussian over latents that also keeps which piece of an episode each row belongs to."""

    def keep(self, batch: TensorDict, observation: Tensor) -> dict[str, Tensor]:
        """See :class:`~genpol.on_policy.likelihood.Likelihood`."""
        kept = super().keep(batch, observation)
        return kept | {"piece": pieces(batch["next", "done"].squeeze(-1))}


class PolicyGradientLearner(OnPolicyLearner):
    """One step of the policy for each rollout, by an estimator; then regression of the critic.

    Args:
        encoder: Actor and critic.
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        generator: Source of the critic's minibatches.
        improve: Learns from the rollout's trajectories, which it may evaluate as often as it likes
            and at whatever parameters the actor then has; returns metrics.
    """

    def __init__(
        self,
        encoder: Encoder,
        settings: PolicyGradientSettings,
        *,
        specs: Specs,
        generator: torch.Generator,
        improve: Callable[[Trajectories], dict[str, Tensor]],
    ) -> None:
        shared = settings.shared()
        super().__init__(
            encoder,
            shared,
            specs=specs,
            generator=generator,
            likelihood=PieceLikelihood(encoder.actor, shared, generator),
        )
        self._normalizes = settings.normalize_advantage
        self._improve = improve

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Learn from a rollout ``[num_envs, time]`` and return metrics."""
        metrics = super().update(batch)
        del metrics["policy/learning_rate"]  # Adam trains the critic alone
        return metrics

    def _optimise(self, rollout: Rows) -> dict[str, Tensor]:
        if len(rollout["target"]) == 0:
            return {}
        metrics = self._improve(lambda: self._trajectories(rollout))
        metrics |= self._fit_critic(rollout)
        return metrics | self._moved(rollout)

    def _trajectories(self, rollout: Rows) -> tuple[Tensor, Tensor]:
        """Return surrogate losses and summed log-probabilities, ``[P]``, of the present actor."""
        log_prob = self._likelihood.log_prob(self.actor_critic.actor, rollout)
        advantage, piece = rollout["advantage"], rollout["piece"]
        if self._normalizes:
            advantage = normalize_advantage(advantage)
        surrogate = sums_over_pieces(-advantage * log_prob, piece)
        # The mean over pieces is then the sum over all steps, divided by their number.
        surrogate = surrogate * (len(surrogate) / len(log_prob))
        return surrogate, sums_over_pieces(log_prob, piece)

    def _fit_critic(self, rollout: Rows) -> dict[str, Tensor]:
        losses: list[Tensor] = []
        for _ in range(self.settings.epochs):
            for rows in self._minibatches(rollout):
                seen = rows[self.actor_critic.critic_key]
                values = self.actor_critic.values_at_normalized(seen)
                loss, metrics = self._critic_loss(*values, rows["target"])
                self._critic_optimizer.step(loss)
                losses.append(metrics["loss/value"])
        return {"loss/value": torch.stack(losses).mean()}

    @torch.no_grad()
    def _moved(self, rollout: Rows) -> dict[str, Tensor]:
        """Return how the actor as it is now differs from the one that explored."""
        evaluation = self._likelihood.evaluate(rollout)
        log_ratio = evaluation.log_prob - rollout["log_prob"]
        return evaluation.metrics | {
            "policy/approx_kl": (torch.expm1(log_ratio) - log_ratio).mean()
        }


class PolicyGradientAgent(Agent):
    """A Gaussian policy behind a tanh, which steps along an estimate with a memory.

    When the policy explores, it does so at the parameters for which the estimator wants the next
    rollout; otherwise, so in evaluation, it acts at theta_t.

    Attributes:
        estimator: Steps the actor's parameters; subclasses make it.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights, exploration and minibatches.
    """

    source = "rollout"
    policy: DecodedPolicy
    estimator: NPGIGT | HARPG

    def __init__(
        self, settings: PolicyGradientSettings, specs: Specs, *, device: str, seed: int
    ) -> None:
        super().__init__()
        self.settings = settings
        self.specs = specs
        self.frames_per_batch = settings.frames_per_batch(specs)
        self.generator = torch.Generator(device).manual_seed(seed)
        encoder = ExploringEncoder(
            specs.observation_dim,
            specs.action_dim,
            settings.shared(),
            generator=self.generator,
            critic_observation_dim=specs.critic_observation_dim,
        ).to(device)
        self.policy = DecodedPolicy(encoder, IdentityDecoder(), generator=self.generator)
        self.learner = PolicyGradientLearner(
            encoder,
            settings,
            specs=specs,
            generator=self.generator,
            improve=self._improve,
        )
        self._theta = list(encoder.actor.parameters())

    @property
    def gradient_steps(self) -> int:  # type: ignore[override]
        """Steps of the policy so far; those of the critic are not counted."""
        return self.estimator.iteration

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Learn from a rollout ``[num_envs, time]`` that the policy has explored."""
        metrics = self.learner.update(batch)
        self._explore_there()
        return metrics

    def training_state(self) -> dict[str, Any]:
        """Return estimator, optimiser of the critic, counters and the generator."""
        return {
            "learner": self.learner.state(),
            "estimator": self.estimator.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""
        self.learner.load_state(state["learner"])
        self.estimator.load_state_dict(state["estimator"])
        self.generator.set_state(state["generator"])
        # Weights that another run was trained to say nothing of where this one explores.
        self._explore_there()

    @abstractmethod
    def _improve(self, trajectories: Trajectories) -> dict[str, Tensor]:
        """Learn from trajectories and return metrics."""

    @abstractmethod
    def _where_to_explore(self) -> AbstractContextManager[None]:
        """Return a context in which the actor has the parameters to explore with."""

    def _explore_there(self) -> None:
        encoder = self.policy.encoder
        assert isinstance(encoder, ExploringEncoder)
        with self._where_to_explore():
            encoder.explore_here()

    def _gradient(self, trajectories: Trajectories) -> tuple[Tensor, ...]:
        """Return the gradient of the loss at the parameters that explored."""
        with self._where_to_explore():
            return torch.autograd.grad(trajectories()[0].mean(), self._theta)
