"""The likelihood of a denoising chain, step by step or as a whole."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from genpol.on_policy.likelihood import Evaluation, Likelihood, Rows
from genpol.policies.chain import Chain, Stochastic
from genpol.policies.denoiser import flatten_chunk
from genpol.policies.gaussian import log_prob


class RatioSettings(Protocol):
    """How ratios are formed; see :class:`~genpol.agents.dppo.Settings`."""

    @property
    def ratio(self) -> str:
        """A ratio for each denoising ``step``, or one for the whole ``path``."""
        ...

    @property
    def per_dimension(self) -> bool:
        """Whether log-densities are averaged over dimensions."""
        ...


class ChainLikelihood(Likelihood):
    """The Gaussian transitions of a denoising chain.

    Args:
        actor: The generative model.
        chain: Its noise.
        settings: How ratios are formed.
        step_weight: Factor on the advantage of each step ``[K]``, if each has its own ratio.
        step_clip: Bound on the ratio of each step ``[K]``; ``None`` for the surrogate's own.
    """

    def __init__(
        self,
        actor: Stochastic,
        chain: Chain,
        settings: RatioSettings,
        *,
        step_weight: Tensor | None = None,
        step_clip: Tensor | None = None,
    ) -> None:
        self.actor = actor
        self.chain = chain
        self.settings = settings
        by_step = settings.ratio == "step"
        self._weight = step_weight if by_step else None
        self._clip = step_clip if by_step else None

    def keep(self, batch: TensorDict, observation: Tensor) -> dict[str, Tensor]:
        """Return the chains, the means of their steps, and log-densities as they are now."""
        kept = {"observation_raw": batch["observation"], "chain": batch["chain"]}
        mean, std = self._transitions(self.actor, kept)
        return kept | {"log_prob": self._density(kept, mean, std), "mean": mean}

    def evaluate(self, rows: Rows) -> Evaluation:
        """See :class:`~genpol.on_policy.likelihood.Likelihood`."""
        mean, std = self._transitions(self.actor, rows)
        density = self._density(rows, mean, std)
        return Evaluation(
            log_prob=density,
            regulariser=self.regulariser(rows, std),
            divergence=lambda: self.divergence(rows, mean, std),
            metrics={"policy/chain_std": std.detach().mean()},
            step_weight=None if self._weight is None else self._weight.to(density),
            step_clip=None if self._clip is None else self._clip.to(density),
        )

    def divergence(self, rows: Rows, mean: Tensor, std: Tensor) -> Tensor:
        """Return the divergence from the chain that collected, whose noise was the same."""
        return self._reduced(((mean - rows["mean"]) / std).square() / 2)

    def regulariser(self, rows: Rows, std: Tensor) -> Tensor:
        """Return a scalar that is added to the loss; none here.

        Args:
            rows: Of the minibatch.
            std: Standard deviations of the steps.
        """
        return std.new_zeros(())

    def log_prob(self, actor: nn.Module, rows: Rows) -> Tensor:
        """See :class:`~genpol.on_policy.likelihood.Likelihood`."""
        return self._density(rows, *self._transitions(actor, rows))

    def _transitions(self, actor: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        assert isinstance(actor, Stochastic)
        return self.chain.transitions(actor, rows["observation_raw"], rows["chain"])

    def _density(self, rows: Rows, mean: Tensor, std: Tensor) -> Tensor:
        states = flatten_chunk(rows["chain"], self.actor.horizon)
        density = log_prob(mean, std, states[..., 1:, :])
        if self.settings.per_dimension:
            density = density / mean.shape[-1]
        return density if self.settings.ratio == "step" else density.sum(-1)

    def _reduced(self, divergence: Tensor) -> Tensor:
        total = divergence.mean(-1) if self.settings.per_dimension else divergence.sum(-1)
        return total if self.settings.ratio == "step" else total.sum(-1)


def clip_schedule(num_steps: int, base: float, top: float) -> Tensor:
    """Return ``c_k = base + (top - base) (e^{3 k / (K - 1)} - 1) / (e^3 - 1)``, ``[K]``.

    The noisiest step, k = 0, is clipped the most tightly (DPPO, arXiv 2409.00588, appendix).
    """
    share = torch.arange(num_steps) / max(1, num_steps - 1)
    return base + (top - base) * torch.expm1(3.0 * share) / math.expm1(3.0)
