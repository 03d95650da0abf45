"""What the learner asks of the policy it trains: how likely an action was, and how far it moved."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from genpol import parallel
from genpol.nn.optimizer import GuardedOptimizer
from genpol.objectives.regularisers import ridge, standard_normal_kl, tanh_entropy_correction
from genpol.on_policy.masks import CurvatureMask
from genpol.on_policy.settings import GaussianSettings
from genpol.policies.gaussian import GaussianPolicy, entropy, gaussian_kl, log_prob

Rows = Mapping[str, Tensor]
"""Tensors ``[B, ...]`` of one minibatch, by name."""


@dataclass(frozen=True)
class Evaluation:
    """The trained policy on one minibatch.

    A policy that acts in K steps may give each its own ratio: ``log_prob`` and ``divergence`` are
    then ``[B, K]``, and every step is a row of the surrogate.

    Attributes:
        log_prob: Log-density of what was done, ``[B]`` or ``[B, K]``.
        regulariser: Scalar that is added to the loss: entropy bonus and prior.
        divergence: Computes ``KL(new || old)``, of the shape of ``log_prob``.
        metrics: Scalars to log.
        step_weight: Factor ``[K]`` on the advantage of each step.
        step_clip: Bound ``[K]`` on the ratio of each step, for surrogates that clip.
    """

    log_prob: Tensor
    regulariser: Tensor
    divergence: Callable[[], Tensor]
    metrics: dict[str, Tensor]
    step_weight: Tensor | None = None
    step_clip: Tensor | None = None


class Likelihood(ABC):
    """Says how likely the rollout's actions are under the actor, then and now."""

    @abstractmethod
    def keep(self, batch: TensorDict, observation: Tensor) -> dict[str, Tensor]:
        """Return what later evaluations need, ``[num_envs, time, ...]`` each.

        Args:
            batch: The rollout.
            observation: Its observations, normalised.

        Returns:
            At least ``log_prob`` under the policy that collected.
        """

    @abstractmethod
    def evaluate(self, rows: Rows) -> Evaluation:
        """Evaluate the actor on rows of what :meth:`keep` returned, and ``observation``."""

    @abstractmethod
    def log_prob(self, actor: nn.Module, rows: Rows) -> Tensor:
        """Return the log-density, as :meth:`evaluate`'s, under another actor of the same kind."""

    def mask(self, rows: Rows, advantage: Tensor, optimizer: GuardedOptimizer) -> Tensor | None:
        """Return which rows ``[B]`` may decide the update; ``None`` for all.

        Args:
            rows: As for :meth:`evaluate`.
            advantage: Of each row, ``[B]``.
            optimizer: Of the actor, to be read.
        """
        return None

    def end_rollout(self) -> None:
        """Take note that a rollout has been learned from."""
        return

    def state(self) -> dict[str, Any]:
        """Return what is remembered from rollout to rollout."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        return


class LatentLikelihood(Likelihood):
    """A Gaussian over latents: closed-form density and divergence.

    Args:
        actor: The network.
        settings: Entropy bonus and prior.
        generator: Source of the noise of the squashed entropy.
    """

    def __init__(
        self, actor: GaussianPolicy, settings: GaussianSettings, generator: torch.Generator
    ) -> None:
        self.actor = actor
        self.settings = settings
        self._generator = generator
        self._mask = CurvatureMask(settings.capo, actor) if settings.capo.enabled else None

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

    def mask(self, rows: Rows, advantage: Tensor, optimizer: GuardedOptimizer) -> Tensor | None:
        """See :class:`~genpol.on_policy.masks.CurvatureMask`."""
        if self._mask is None:
            return None
        return self._mask.keep(rows["observation"], rows["latent"], advantage, optimizer)

    def end_rollout(self) -> None:
        """See :class:`Likelihood`."""
        if self._mask is not None:
            self._mask.end_rollout()

    def state(self) -> dict[str, Any]:
        """See :class:`Likelihood`."""
        return {} if self._mask is None else self._mask.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """See :class:`Likelihood`."""
        if self._mask is not None and state:
            self._mask.load_state(state)

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
            generator = parallel.branch(self._generator)
            noise = torch.empty_like(mean).normal_(generator=generator)
            gain = self.settings.action_gain
            bonus = bonus + tanh_entropy_correction(gain * (mean + scale * noise))[0]
            bonus = bonus + mean.shape[-1] * math.log(gain)
        return bonus
