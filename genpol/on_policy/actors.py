"""What acts on-policy: a Gaussian over latents, a critic, and a frozen decoder behind them.

A Gaussian *encoder* ``pi(z | s)`` draws a latent, a frozen *decoder* turns it into ``a = g(s, z)``,
and the environment receives ``tanh(a)``. Decoder and squash belong to the environment as far as the
likelihood ratio is concerned, so no Jacobian appears and no gradient reaches the decoder
(arXiv 2512.02581, Lemmas 3.1 and 3.2). With the identity as decoder it is a Gaussian policy.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.envs import ExplorationType, exploration_type

from genpol.nn.mlp import MLP
from genpol.nn.normalizer import RunningNormalizer
from genpol.on_policy.settings import GaussianSettings, OnPolicySettings
from genpol.policies.gaussian import GaussianPolicy, log_prob


class Decoder(Protocol):
    """Turns observation and latent into an action before the squash."""

    def sample(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Return the pre-squash action ``[B, A]`` for ``observation [B, d]``, ``noise [B, A]``."""
        ...


class ActorCritic(nn.Module):
    """What is trained on-policy: an actor and its critics behind one observation normaliser.

    Critics that see more than a robot can measure (``critic_observation``, as of many tasks of
    Isaac Lab) have a normaliser of their own.

    Attributes:
        actor: Owns the normaliser, which the critics share.
        critic_key: Under which a step holds what the critics see.
        critic: Scaled values, one for each reward that is learned apart.
        median_critic: Soft medians of the scaled returns, for surrogates that want them.
        learns_statistics: Whether the normaliser takes in what is collected.

    Args:
        actor: A policy with a ``normalizer``, which is replaced as the settings say.
        observation_dim: Size of the observation.
        settings: Network sizes.
        generator: Source of the critics' initial weights.
        num_values: Values K of the critic.
        critic_observation_dim: Size of what the critics see, if it is not the observation.
    """

    def __init__(
        self,
        actor: nn.Module,
        observation_dim: int,
        settings: OnPolicySettings,
        *,
        generator: torch.Generator,
        num_values: int = 1,
        critic_observation_dim: int = 0,
    ) -> None:
        super().__init__()
        self.actor = actor
        self.learns_statistics = True
        merge: Literal["exact", "released"] = (
            "exact" if settings.normalizer == "exact" else "released"
        )
        self.actor.normalizer = RunningNormalizer(observation_dim, merge=merge)
        self.critic_key = "critic_observation" if critic_observation_dim > 0 else "observation"
        self.critic_normalizer: RunningNormalizer | None = None
        if critic_observation_dim > 0:
            self.critic_normalizer = RunningNormalizer(critic_observation_dim, merge=merge)
        width = critic_observation_dim or observation_dim
        # A random critic would drown sparse rewards in its own error for a million steps.
        sizes = settings.critic_hidden
        self.critic = MLP(width, num_values, sizes, output_gain=0.0, generator=generator)
        self.median_critic = None
        if settings.median_temperature is not None:
            self.median_critic = MLP(width, 1, sizes, output_gain=0.0, generator=generator)

    @property
    def normalizer(self) -> RunningNormalizer:
        """Observation statistics, which actor and critic share."""
        normalizer = self.actor.normalizer
        assert isinstance(normalizer, RunningNormalizer)
        return normalizer

    def critic_view(self, observation: Tensor) -> Tensor:
        """Normalise what a step holds under ``critic_key``, ``[..., d]``."""
        normalizer = self.critic_normalizer or self.normalizer
        seen: Tensor = normalizer(observation)
        return seen

    def update_statistics(self, steps: TensorDictBase) -> None:
        """Take steps into the normalisers, where these learn, and those of all ranks."""
        if not self.learns_statistics:
            return
        self.normalizer.update(steps["observation"], of_all_ranks=True)
        if self.critic_normalizer is not None:
            self.critic_normalizer.update(steps[self.critic_key], of_all_ranks=True)

    def value(self, observation: Tensor) -> Tensor:
        """Return scaled values ``[..., K]`` at what critics see, raw, ``[..., d]``."""
        values: Tensor = self.critic(self.critic_view(observation))
        return values

    def values_at_normalized(self, observation: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scaled values ``[..., K]`` and, with such a critic, soft medians ``[...]``."""
        value = self.critic(observation)
        if self.median_critic is None:
            return value, None
        return value, self.median_critic(observation).squeeze(-1)

    def copy_critics(self, other: ActorCritic) -> None:
        """Take over the critics and observation statistics of another."""
        self.critic.load_state_dict(other.critic.state_dict())
        if self.median_critic is not None and other.median_critic is not None:
            self.median_critic.load_state_dict(other.median_critic.state_dict())
        self.normalizer.load_state_dict(other.normalizer.state_dict())
        self.copy_critic_statistics(other)

    def copy_critic_statistics(self, other: ActorCritic) -> None:
        """Take over the statistics that are the critics' own, if they have any."""
        if self.critic_normalizer is not None and other.critic_normalizer is not None:
            self.critic_normalizer.load_state_dict(other.critic_normalizer.state_dict())


class Encoder(ActorCritic):
    """A Gaussian over latents, and its critics.

    Args:
        observation_dim: Size of the observation.
        latent_dim: Size of the latent, equal to that of the action.
        settings: Network sizes and initialisation.
        generator: Source of the initial weights.
        init: ``gaussian`` or ``fresh``; see :class:`~genpol.on_policy.GaussianSettings`.
        num_values: Values K of the critic.
        critic_observation_dim: Size of what the critics see, if it is not the observation.
    """

    actor: GaussianPolicy

    def __init__(
        self,
        observation_dim: int,
        latent_dim: int,
        settings: GaussianSettings,
        *,
        generator: torch.Generator,
        init: str,
        num_values: int = 1,
        critic_observation_dim: int = 0,
    ) -> None:
        actor = GaussianPolicy(
            observation_dim,
            latent_dim,
            settings.actor_hidden,
            max_scale=settings.max_scale,
            state_dependent_scale=settings.state_dependent_scale,
            generator=generator,
        )
        if init == "gaussian":
            actor.reset_to_prior()
        super().__init__(
            actor,
            observation_dim,
            settings,
            generator=generator,
            num_values=num_values,
            critic_observation_dim=critic_observation_dim,
        )

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation ``[..., A]`` at raw observations ``[..., d]``."""
        mean, scale = self.actor(observation)
        return mean, scale


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

    def load_noise(self, noise: Tensor | None) -> None:
        """Restore the last noise drawn; checkpoints come back on the CPU."""
        self.noise = None if noise is None else noise.to(self.encoder.normalizer.shift.device)

    def _draw_noise(self, like: Tensor) -> Tensor:
        noise = torch.empty_like(like).normal_(generator=self._generator)
        if self._correlation == 0.0:
            return noise
        if self.noise is not None and self.noise.shape == noise.shape:
            rest = math.sqrt(1.0 - self._correlation**2)
            noise = self._correlation * self.noise + rest * noise
        self.noise = noise
        return noise
