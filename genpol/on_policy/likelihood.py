"""What the learner asks of the policy it trains: how likely an action was, and how far it moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from genpol.objectives.regularisers import ridge, standard_normal_kl, tanh_entropy_correction
from genpol.on_policy.settings import OnPolicySettings
from genpol.policies.gaussian import GaussianPolicy, entropy, log_prob

Rows = Mapping[str, Tensor]
"""Tensors ``[B, ...]`` of one minibatch, by name."""


@dataclass(frozen=True)
class Evaluation:
    """The trained policy on one minibatch.

    Attributes:
        log_prob: Log-density of what was done, ``[B]``.
        regulariser: Scalar that is added to the loss: entropy bonus and prior.
        divergence: Computes ``KL(new || old)`` of each row, ``[B]``.
        metrics: Scalars to log.
    """

    log_prob: Tensor
    regulariser: Tensor
    divergence: Callable[[], Tensor]
    metrics: dict[str, Tensor]


class Likelihood(Protocol):
    """Says how likely the rollout's actions are under the actor, then and now."""

    def keep(self, batch: TensorDict, observation: Tensor) -> dict[str, Tensor]:
        """Return what later evaluations need, ``[num_envs, time, ...]`` each.

        Args:
            batch: The rollout.
            observation: Its observations, normalised.

        Returns:
            At least ``log_prob`` under the policy that collected.
        """
        ...

    def evaluate(self, rows: Rows) -> Evaluation:
        """Evaluate the actor on rows of what :meth:`keep` returned, and ``observation``."""
        ...

    def log_prob(self, actor: nn.Module, rows: Rows) -> Tensor:
        """Return the log-density ``[B]`` under another actor of the same kind."""
        ...


class LatentLikelihood:
    """A Gaussian over latents: closed-form density and divergence.

    Args:
        actor: The network.
        settings: Entropy bonus and prior.
        generator: Source of the noise of the squashed entropy.
    """

    def __init__(
        self, actor: GaussianPolicy, settings: OnPolicySettings, generator: torch.Generator
    ) -> None:
        self.actor = actor
        self.settings = settings
        self._generator = generator

    def keep(self, batch: TensorDict, observation: Tensor) -> dict[str, Tensor]:
        """Return latents, their log-densities, and for divergences the Gaussian they came from."""
        kept = {"latent": batch["latent"], "log_prob": batch["latent_log_prob"]}
        if self.settings.surrogate == "mdpo":
            kept["mean"], kept["scale"] = self.actor.at_normalized(observation)
        return kept

    def evaluate(self, rows: Rows) -> Evaluation:
        """See :class:`Likelihood`."""
        mean, scale = self.actor.at_normalized(rows["observation"])
        latent = rows["latent"].abs()
        return Evaluation(
            log_prob=log_prob(mean, scale, rows["latent"]),
            regulariser=self._regulariser(mean, scale),
            divergence=lambda: gaussian_kl(mean, scale, rows["mean"], rows["scale"]),
            metrics={
                "policy/scale": scale.detach().mean(),
                "latent/mean_abs": latent.mean(),
                "latent/beyond_3": (latent > 3).float().mean(),
            },
        )

    def log_prob(self, actor: nn.Module, rows: Rows) -> Tensor:
        """See :class:`Likelihood`."""
        assert isinstance(actor, GaussianPolicy)
        return log_prob(*actor.at_normalized(rows["observation"]), rows["latent"])

    def _regulariser(self, mean: Tensor, scale: Tensor) -> Tensor:
        settings = self.settings
        total = mean.new_zeros(())
        if settings.entropy_coefficient > 0:
            total = total - settings.entropy_coefficient * self._entropy(mean, scale)
        if settings.prior == "ridge":
            total = total + settings.prior_coefficient * ridge(mean, scale)[0]
        elif settings.prior == "kl":
            total = total + settings.prior_coefficient * standard_normal_kl(mean, scale)[0]
        return total

    def _entropy(self, mean: Tensor, scale: Tensor) -> Tensor:
        bonus = entropy(mean, scale).mean()
        if self.settings.squashed_entropy:
            # The action is tanh(gain z): its entropy has the logarithm of the gain as well.
            noise = torch.empty_like(mean).normal_(generator=self._generator)
            gain = self.settings.action_gain
            bonus = bonus + tanh_entropy_correction(gain * (mean + scale * noise))[0]
            bonus = bonus + mean.shape[-1] * math.log(gain)
        return bonus


def gaussian_kl(mean: Tensor, scale: Tensor, old_mean: Tensor, old_scale: Tensor) -> Tensor:
    """Return ``KL(N(mean, scale^2) || N(old_mean, old_scale^2))`` summed over the last dimension.

    ``log(s_old / s) + (s^2 + (m - m_old)^2) / (2 s_old^2) - 1/2`` per dimension: new against old,
    the direction of mirror descent (arXiv 2005.09814), opposite to TRPO's.
    """
    spread = (scale.square() + (mean - old_mean).square()) / (2 * old_scale.square())
    return (old_scale.log() - scale.log() + spread - 0.5).sum(-1)
