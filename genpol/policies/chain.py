"""The denoising steps as a Markov chain, with a likelihood: one rule for sampling and scoring.

A likelihood ratio is only right if the chain is scored by the very transitions that it was sampled
with: schedule, correction, clip and grid. They are therefore one object here, and all agents that
learn by the likelihood of their chains share it (DPPO, arXiv 2409.00588; ReinFlow, 2505.22094; BPO;
OGPO, 2605.03065).

Actions and noise have the policy's own shape, ``[..., A]`` or, of chunks, ``[..., H, A]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from genpol import settings as check
from genpol.policies.denoiser import flatten_chunk
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy
from genpol.policies.gaussian import log_prob
from genpol.policies.noisy_flow import NoisyFlow

Stochastic = FlowPolicy | DiffusionPolicy | NoisyFlow
"""Policies whose denoising steps are, or can be made, random; a noisy flow's noise is its own."""

SCHEDULES = ("tapered", "constant")
CORRECTIONS = ("marginal", "official", "none")


@dataclass(frozen=True, kw_only=True)
class ChainSettings:
    """The noise of a denoising chain; of a noisy flow only `noise_clip` counts."""

    sigma: float = 0.05
    """Noise of a flow's steps, see `schedule`; the least standard deviation of a diffusion model's,
    which have their own."""
    schedule: str = "tapered"
    """A flow's standard deviations: sigma sqrt(1 - t) at time t (`tapered`), or `constant`."""
    correction: str = "marginal"
    """What a flow's noise adds to the drift: what keeps the `marginal` laws, that times 1/K as in
    OGPO's released code (`official`), or `none` as in DPPO and ReinFlow."""
    clip: float = 1.0
    """Bound on the absolute means of a flow's steps; 0 for none."""
    noise_clip: float = 3.0
    """Bound on the absolute draws, in standard deviations. The density remains the Gaussian's."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.positive("chain.sigma", self.sigma)
        check.positive("chain.noise_clip", self.noise_clip)
        check.at_least("chain.clip", self.clip, 0.0)
        check.one_of("chain.schedule", self.schedule, SCHEDULES)
        check.one_of("chain.correction", self.correction, CORRECTIONS)


class Chain:
    """The denoising chain of a policy.

    Args:
        policy: Whose chain it is; the methods take others of the same kind and number of steps.
        settings: Its noise.
    """

    def __init__(self, policy: Stochastic, settings: ChainSettings) -> None:
        self.settings = settings
        self._options: dict[str, Any] = {}
        if isinstance(policy, DiffusionPolicy):
            self._options = {"sigma": settings.sigma}
        elif isinstance(policy, FlowPolicy):
            constant = [settings.sigma] * policy.num_steps
            self._options = {
                "sigma": settings.sigma if settings.schedule == "tapered" else constant,
                "correction": settings.correction,
                "clip": settings.clip or None,
            }
        self.num_steps = policy.num_steps
        self.action_shape = policy.action_shape

    def draw(
        self, leading: Sequence[int], generator: torch.Generator, *, explore: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Draw what a chain begins from and the noise of its steps.

        Args:
            leading: Leading dimensions.
            generator: Source of the numbers.
            explore: Whether they are random; else they are zero.

        Returns:
            ``[*leading, *action_shape]`` and ``[*leading, K, *action_shape]``.
        """
        start = (*leading, *self.action_shape)
        steps = (*leading, self.num_steps, *self.action_shape)
        device = generator.device
        if not explore:
            return torch.zeros(start, device=device), torch.zeros(steps, device=device)
        bound = self.settings.noise_clip
        noise = torch.randn(start, generator=generator, device=device)
        return noise, torch.randn(steps, generator=generator, device=device).clamp(-bound, bound)

    def sample(
        self,
        policy: Stochastic,
        observation: Tensor,
        noise: Tensor,
        step_noise: Tensor,
    ) -> Tensor:
        """Return the states ``[..., K + 1, *action_shape]``; the last is the action, not clipped.

        Args:
            policy: What makes the steps.
            observation: ``[B, d]``, which further leading dimensions of the noise share.
            noise: Of :meth:`draw`.
            step_noise: Of :meth:`draw`.
        """
        return policy.chain(observation, noise, step_noise, **self._options)

    def transitions(
        self, policy: Stochastic, observation: Tensor, states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return means ``[..., K, D]`` and standard deviations ``[K, 1]`` of flattened actions.

        Args:
            policy: Whose steps they are taken for; gradients reach its weights.
            observation: ``[B, d]``.
            states: Of :meth:`sample`.
        """
        return policy.chain_transitions(observation, states, **self._options)

    def log_prob(
        self,
        policy: Stochastic,
        observation: Tensor,
        states: Tensor,
        *,
        last_steps: int = 0,
    ) -> Tensor:
        """Return the log-density of a chain's transitions, summed over steps and dimensions.

        The initial noise, which no policy decides on, is left out.

        Args:
            policy: See :meth:`transitions`.
            observation: See :meth:`transitions`.
            states: See :meth:`transitions`.
            last_steps: Only so many steps count, the last; 0 for all.
        """
        mean, std = self.transitions(policy, observation, states)
        flat = flatten_chunk(states, policy.horizon)[..., 1:, :]
        return log_prob(mean, std, flat)[..., -last_steps:].sum(-1)
