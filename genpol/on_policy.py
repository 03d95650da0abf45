"""PPO on the input noise of a frozen decoder; with the identity as decoder it is Gaussian PPO.

A Gaussian *encoder* ``pi(z | s)`` draws a latent, a frozen *decoder* turns it into ``a = g(s, z)``,
and the environment receives ``tanh(a)``. Decoder and squash belong to the environment as far as the
likelihood ratio is concerned, so no Jacobian appears and no gradient reaches the decoder
(arXiv 2512.02581, Lemmas 3.1 and 3.2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.envs import ExplorationType, exploration_type

from genpol import settings as check
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.nn.mlp import MLP
from genpol.nn.normalizer import RunningNormalizer
from genpol.nn.optimizer import GuardedOptimizer
from genpol.objectives.advantages import brax_gae, gae, normalize_advantage
from genpol.objectives.ppo import (
    clipped_surrogate,
    ridge,
    standard_normal_kl,
    tanh_entropy_correction,
    value_loss,
)
from genpol.policies.gaussian import GaussianPolicy, entropy, log_prob


@dataclass(frozen=True, kw_only=True)
class OnPolicySettings:
    """Hyper-parameters that the on-policy agents share."""

    rollout_steps: int = 64
    """Actions of every environment between two updates."""
    epochs: int = 4
    """Passes over each rollout."""
    minibatches: int = 16
    """Optimiser steps per pass."""
    gamma: float = 0.99
    """Discount per decision."""
    gae_lambda: float = 0.95
    """Decay of generalised advantage estimation."""
    advantage: str = "gae"
    """Estimator: textbook `gae`, or `brax` (no lambda on the first link)."""
    clip: float = 0.2
    """Likelihood ratios are clipped to 1 plus or minus this."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    squashed_entropy: bool = False
    """Whether the entropy is that of the action after tanh (penalises saturation)."""
    prior: str = "kl"
    """What holds the latent near N(0, I): `kl`, `ridge` (the released code; its optimum is a point
    mass) or `none`."""
    prior_coefficient: float = 1e-2
    """Weight of that regulariser."""
    learning_rate: float = 1e-3
    """Adam step size of the actor at the start."""
    critic_learning_rate: float = 1e-3
    """Adam step size of the critic."""
    target_kl: float = 0.015
    """Divergence per update to which the actor's step size adapts; 0 keeps it constant."""
    max_grad_norm: float = 0.5
    """Gradients of actor and critic are each clipped to this global norm."""
    reward_scale: float = 0.1
    """Rewards are multiplied by this before the critic sees them."""
    actor_hidden: list[int] = field(default_factory=lambda: [64, 64])
    """Widths of the actor's hidden layers."""
    critic_hidden: list[int] = field(default_factory=lambda: [64, 64])
    """Widths of the critic's hidden layers."""
    action_gain: float = 1.0
    """Factor from the latent to the action before the squash, as long as no decoder is fitted."""
    noise_correlation: float = 0.0
    """Correlation of the exploration noise from one action to the next; 0 is white noise."""
    encoder_init: str = "gaussian"
    """`gaussian` starts at exactly N(0, I) for every observation, `fresh` at random weights."""
    max_scale: float = 10.0
    """Upper bound of the standard deviation."""
    normalizer: str = "exact"
    """Merge of observation statistics; `released` reproduces the defect of the GoRL release."""
    nonfinite_patience: int = 10
    """Non-finite losses in a row that stop the run."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        for name in ("rollout_steps", "epochs", "minibatches", "learning_rate"):
            check.positive(f"agent.{name}", getattr(self, name))
        for name in (
            "critic_learning_rate",
            "max_grad_norm",
            "reward_scale",
            "clip",
            "action_gain",
        ):
            check.positive(f"agent.{name}", getattr(self, name))
        check.at_least("agent.max_scale", self.max_scale, 1.0)  # N(0, I) must be within reach
        check.widths("agent.actor_hidden", self.actor_hidden)
        check.widths("agent.critic_hidden", self.critic_hidden)
        for name in ("entropy_coefficient", "prior_coefficient", "target_kl"):
            check.at_least(f"agent.{name}", getattr(self, name), 0.0)
        for name in ("gamma", "gae_lambda"):
            check.within(f"agent.{name}", getattr(self, name), 0.0, 1.0)
        check.within("agent.noise_correlation", self.noise_correlation, 0.0, 0.99)
        check.one_of("agent.advantage", self.advantage, ("gae", "brax"))
        check.one_of("agent.prior", self.prior, ("ridge", "kl", "none"))
        check.one_of("agent.encoder_init", self.encoder_init, ("gaussian", "fresh"))
        check.one_of("agent.normalizer", self.normalizer, ("exact", "released"))

    def frames_per_batch(self, specs: Specs) -> int:
        """Return the actions in one rollout of all environments.

        Raises:
            ConfigError: If they do not fill the minibatches.
        """
        frames = self.rollout_steps * specs.num_envs
        if frames < self.minibatches:
            raise ConfigError(
                f"agent.minibatches = {self.minibatches}: a rollout has only {frames} rows "
                "(agent.rollout_steps x num_envs); lower it or raise one of those"
            )
        return frames


class Decoder(Protocol):
    """Turns observation and latent into an action before the squash."""

    def sample(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Return the pre-squash action ``[B, A]`` for ``observation [B, d]``, ``noise [B, A]``."""
        ...


class Encoder(nn.Module):
    """Gaussian over latents and critic, behind one running observation normaliser.

    Args:
        observation_dim: Size of the observation.
        latent_dim: Size of the latent, equal to that of the action.
        settings: Network sizes and initialisation.
        generator: Source of the initial weights.
        init: ``gaussian`` or ``fresh``; see :class:`OnPolicySettings`.
    """

    def __init__(
        self,
        observation_dim: int,
        latent_dim: int,
        settings: OnPolicySettings,
        *,
        generator: torch.Generator,
        init: str,
    ) -> None:
        super().__init__()
        self.actor = GaussianPolicy(
            observation_dim,
            latent_dim,
            settings.actor_hidden,
            max_scale=settings.max_scale,
            generator=generator,
        )
        self.actor.normalizer = RunningNormalizer(
            observation_dim, merge="exact" if settings.normalizer == "exact" else "released"
        )
        if init == "gaussian":
            self.actor.reset_to_prior()
        # A random critic would drown sparse rewards in its own error for a million steps.
        self.critic = MLP(
            observation_dim, 1, settings.critic_hidden, output_gain=0.0, generator=generator
        )

    @property
    def normalizer(self) -> RunningNormalizer:
        """Observation statistics, which actor and critic share."""
        return self.actor.normalizer

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation ``[..., A]`` at raw observations ``[..., d]``."""
        mean, scale = self.actor(observation)
        return mean, scale

    def value(self, observation: Tensor) -> Tensor:
        """Return scaled values ``[...]`` at raw observations ``[..., d]``."""
        return self.critic(self.normalizer(observation)).squeeze(-1)


class DecodedPolicy(TensorDictModuleBase):
    """The policy that acts: latent from the encoder, action ``tanh(decoder(latent))``.

    Exploration noise may be correlated in time, as a first-order autoregression whose marginal
    stays N(0, I): pushes that last explore legged robots better than jitter. The likelihood is that
    of the marginal, as in Hollenstein et al. 2024 (coloured noise in PPO, arXiv 2312.11091).

    Attributes:
        encoder: Gaussian over latents, trained.
        decoder: Frozen generator; agents replace it in place.
        noise: Last noise drawn ``[num_envs, A]``; part of the training state.

    Args:
        encoder: See above.
        decoder: See above.
        generator: Source of the exploration noise.
        noise_correlation: Correlation of the noise of successive actions.
    """

    decoder: Decoder

    def __init__(
        self,
        encoder: Encoder,
        decoder: Decoder,
        *,
        generator: torch.Generator,
        noise_correlation: float = 0.0,
    ) -> None:
        super().__init__()
        self.in_keys = ["observation"]
        self.out_keys = ["latent", "latent_log_prob", "decoded", "action"]
        self.encoder = encoder
        self.decoder = decoder
        self.noise: Tensor | None = None
        self._generator = generator
        self._correlation = noise_correlation

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write latent, its log density, the decoded and the squashed action."""
        observation = tensordict["observation"]
        mean, scale = self.encoder(observation)
        latent = mean
        if exploration_type() in (ExplorationType.RANDOM, None):
            latent = mean + scale * self._draw_noise(mean)
        decoded = self.decoder.sample(observation, latent)
        tensordict.set("latent", latent)
        tensordict.set("latent_log_prob", log_prob(mean, scale, latent))
        tensordict.set("decoded", decoded)
        tensordict.set("action", torch.tanh(decoded))
        return tensordict

    def _draw_noise(self, like: Tensor) -> Tensor:
        noise = torch.empty_like(like).normal_(generator=self._generator)
        if self._correlation == 0.0:
            return noise
        if self.noise is not None and self.noise.shape == noise.shape:
            rest = math.sqrt(1.0 - self._correlation**2)
            noise = self._correlation * self.noise + rest * noise
        self.noise = noise
        return noise


@dataclass(frozen=True)
class _Rollout:
    """One rollout flattened to rows, with observations already normalised."""

    observation: Tensor
    latent: Tensor
    log_prob: Tensor
    advantage: Tensor
    target: Tensor

    def take(self, rows: Tensor) -> _Rollout:
        return _Rollout(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))


class PPOLearner:
    """Clipped policy gradient on latents plus regression of the critic.

    Rollout and optimisation see the *same* observation statistics, which are updated afterwards;
    otherwise the first likelihood ratios would already differ from one.

    Args:
        encoder: What is trained.
        settings: Hyper-parameters.
        generator: Source of the minibatch order.
    """

    def __init__(
        self, encoder: Encoder, settings: OnPolicySettings, *, generator: torch.Generator
    ) -> None:
        self.encoder = encoder
        self.settings = settings
        self.gradient_steps = 0
        self._generator = generator
        self._actor_optimizer = self._optimizer("actor", settings.learning_rate)
        self._critic_optimizer = self._optimizer("critic", settings.critic_learning_rate)

    @property
    def skipped(self) -> int:
        """Optimiser steps left out because loss or gradient were not finite."""
        return self._actor_optimizer.skipped + self._critic_optimizer.skipped

    def _optimizer(self, name: str, learning_rate: float) -> GuardedOptimizer:
        return GuardedOptimizer(
            self.encoder.get_submodule(name).parameters(),
            learning_rate,
            max_grad_norm=self.settings.max_grad_norm,
            eps=1e-5,
            patience=self.settings.nonfinite_patience,
            name=name,
        )

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Learn from a rollout ``[num_envs, time]`` and return metrics."""
        rollout, metrics = self._prepare(batch)
        history = self._optimise(rollout)
        self.encoder.normalizer.update(batch["observation"])
        for name in history[-1] if history else ():
            metrics[name] = torch.stack([step[name] for step in history]).mean()
        metrics["policy/learning_rate"] = torch.tensor(self._actor_optimizer.learning_rate)
        metrics["skipped_updates"] = torch.tensor(float(self.skipped))
        return metrics

    def _optimise(self, rollout: _Rollout) -> list[dict[str, Tensor]]:
        """Make the passes over a rollout and return the metrics of every step."""
        rows = len(rollout.target)
        if rows == 0:
            return []
        # Without any reward all advantages are zero, and Adam, which knows no scale, would let the
        # prior alone move the actor at full speed.
        learn_actor = bool(rollout.advantage.abs().max() > 1e-8)
        history: list[dict[str, Tensor]] = []
        for _ in range(self.settings.epochs):
            order = torch.randperm(rows, generator=self._generator, device=self._generator.device)
            minibatches = order.tensor_split(min(self.settings.minibatches, rows))
            history.extend(self._step(rollout.take(part), learn_actor) for part in minibatches)
        if learn_actor:
            divergence = [step["policy/approx_kl"] for step in history[-len(minibatches) :]]
            self._adapt_learning_rate(torch.stack(divergence).mean())
        return history

    @torch.no_grad()
    def _prepare(self, batch: TensorDict) -> tuple[_Rollout, dict[str, Tensor]]:
        settings, after = self.settings, batch["next"]
        observation = self.encoder.normalizer(batch["observation"])
        value = self.encoder.critic(observation).squeeze(-1)
        done = after["done"].squeeze(-1)
        # The next step's value is at hand except where an episode or the rollout ends.
        next_value = torch.cat([value[:, 1:], value[:, -1:]], dim=1)
        ends = done.clone()
        ends[:, -1] = True
        next_value[ends] = self.encoder.value(after["observation"][ends])
        estimate = gae if settings.advantage == "gae" else brax_gae
        advantage, target = estimate(
            after["reward"].squeeze(-1) * settings.reward_scale,
            value,
            next_value,
            after["terminated"].squeeze(-1),
            done,
            settings.gamma,
            settings.gae_lambda,
        )
        keep = ~after["diverged"].flatten()
        rollout = _Rollout(
            observation.flatten(0, 1),
            batch["latent"].flatten(0, 1),
            batch["latent_log_prob"].flatten(),
            advantage.flatten(),
            target.flatten(),
        ).take(keep)
        residual = (target - value).flatten()[keep]
        latent = rollout.latent.abs()
        metrics = {
            "value/explained_variance": 1 - residual.var() / rollout.target.var(),
            "value/mean": value.mean() / settings.reward_scale,
            "latent/mean_abs": latent.mean(),
            "latent/beyond_3": (latent > 3).float().mean(),
        }
        return rollout, metrics

    def _step(self, rows: _Rollout, learn_actor: bool = True) -> dict[str, Tensor]:
        settings = self.settings
        mean, scale = self.encoder.actor.at_normalized(rows.observation)
        log_ratio = log_prob(mean, scale, rows.latent) - rows.log_prob
        advantage = normalize_advantage(rows.advantage)
        loss, metrics = clipped_surrogate(log_ratio, advantage, settings.clip)
        if settings.entropy_coefficient > 0:
            loss = loss - settings.entropy_coefficient * self._entropy(mean, scale)
        if settings.prior == "ridge":
            loss = loss + settings.prior_coefficient * ridge(mean, scale)[0]
        elif settings.prior == "kl":
            loss = loss + settings.prior_coefficient * standard_normal_kl(mean, scale)[0]
        if learn_actor:
            self._actor_optimizer.step(loss)
        value = self.encoder.critic(rows.observation).squeeze(-1)
        value_error, _ = value_loss(value, rows.target)
        self._critic_optimizer.step(value_error)
        self.gradient_steps += 1
        return {
            **metrics,
            "loss/policy": loss.detach(),
            "loss/value": value_error.detach(),
            "policy/scale": scale.detach().mean(),
        }

    def _entropy(self, mean: Tensor, scale: Tensor) -> Tensor:
        bonus = entropy(mean, scale).mean()
        if self.settings.squashed_entropy:
            noise = torch.empty_like(mean).normal_(generator=self._generator)
            bonus = bonus + tanh_entropy_correction(mean + scale * noise)[0]
        return bonus

    def _adapt_learning_rate(self, divergence: Tensor) -> None:
        """Steer the actor's step size towards the target divergence (as rsl_rl does).

        It moves by factors of 1.5 between 1e-5 and 1e-2, or up to a start outside that range.
        """
        target, optimizer = self.settings.target_kl, self._actor_optimizer
        if target == 0:
            return
        rate = optimizer.learning_rate
        if divergence > 2 * target:
            optimizer.learning_rate = min(rate, max(rate / 1.5, 1e-5))
        elif divergence < target / 2:
            optimizer.learning_rate = max(rate, min(rate * 1.5, 1e-2))

    def state(self) -> dict[str, Any]:
        """Return optimisers and counters."""
        return {
            "actor_optimizer": self._actor_optimizer.state_dict(),
            "critic_optimizer": self._critic_optimizer.state_dict(),
            "gradient_steps": self.gradient_steps,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._actor_optimizer.load_state_dict(state["actor_optimizer"])
        self._critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.gradient_steps = state["gradient_steps"]
