"""What acts on-policy: a Gaussian over latents, a critic, and a frozen decoder behind them.

A Gaussian *encoder* ``pi(z | s)`` draws a latent, a frozen *decoder* turns it into ``a = g(s, z)``,
and the environment receives ``tanh(a)``. Decoder and squash belong to the environment as far as the
likelihood ratio is concerned, so no Jacobian appears and no gradient reaches the decoder
(arXiv 2512.02581, Lemmas 3.1 and 3.2). With the identity as decoder it is a Gaussian policy.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.envs import ExplorationType, exploration_type

from genpol.nn.mlp import MLP
from genpol.nn.normalizer import RunningNormalizer
from genpol.on_policy.settings import OnPolicySettings
from genpol.policies.gaussian import GaussianPolicy, log_prob


class Decoder(Protocol):
    """Turns observation and latent into an action before the squash."""

    def sample(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Return the pre-squash action ``[B, A]`` for ``observation [B, d]``, ``noise [B, A]``."""
        ...


class Encoder(nn.Module):
    """Gaussian over latents and critics, behind one running observation normaliser.

    Attributes:
        actor: The Gaussian.
        critic: Scaled values.
        median_critic: Soft medians of the scaled returns, for surrogates that want them.

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
        self.critic = self._make_critic(observation_dim, settings, generator)
        self.median_critic = None
        if settings.median_temperature is not None:
            self.median_critic = self._make_critic(observation_dim, settings, generator)

    @staticmethod
    def _make_critic(
        observation_dim: int, settings: OnPolicySettings, generator: torch.Generator
    ) -> MLP:
        hidden = settings.critic_hidden
        return MLP(observation_dim, 1, hidden, output_gain=0.0, generator=generator)

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

    def values_at_normalized(self, observation: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scaled values ``[...]`` and, where there is such a critic, soft medians."""
        value = self.critic(observation).squeeze(-1)
        if self.median_critic is None:
            return value, None
        return value, self.median_critic(observation).squeeze(-1)

    def copy_critics(self, other: Encoder) -> None:
        """Take over the critics and observation statistics of another encoder."""
        self.critic.load_state_dict(other.critic.state_dict())
        if self.median_critic is not None and other.median_critic is not None:
            self.median_critic.load_state_dict(other.median_critic.state_dict())
        self.normalizer.load_state_dict(other.normalizer.state_dict())


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
