"""Correction of actions at test time: towards denser data, and towards denser states.

Of CDSA (Liu et al. 2024, arXiv 2406.07541) the idea is published: the gradient field of the data's
density, learned by denoising score matching, nudges the actions of any trained policy, and an
inverse-dynamics model turns its state part into an auxiliary action. **The equations are a
reconstruction** (nothing beyond the abstract was at hand), so this is "CDSA-style". One step, at
the state s and the action a, with the displacements ``T = sigma^2 G`` of
:mod:`genpol.policies.density`:

``a <- clip(a + bounded(eta_a T_a + d_s), -1, 1)``, where ``bounded`` shortens a vector to
``max_norm sqrt(A)`` and ``d_s`` is, by ``form``,

=========== ==================================================================================
``delta``   ``J(s, s + eta_s T_s) - J(s, s)``: no gradient, no correction. The default.
``plain``   ``eta_s J(s, s + T_s)``: holds the state where there is no gradient, which is a bias.
``convex``  ``eta_s (J(s, s + T_s) - a)``: a mixture of both actions.
=========== ==================================================================================

The state is anchored at s itself (the literal reading; a forward model could anchor it where the
action leads). Steps in Tweedie units are safe for ``eta_a <= 1``: the density blurred by sigma has
curvature of at most ``1 / sigma^2``, so up to ``eta_a = 2`` none lowers the log-density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from genpol import settings as check
from genpol.errors import ConfigError
from genpol.policies.density import Score

FORMS = ("delta", "plain", "convex")


@dataclass(frozen=True, kw_only=True)
class CorrectionSettings:
    """Correction at test time."""

    action_weight: float = 0.25
    """eta_a: share of the way to the denoised action."""
    state_weight: float = 0.1
    """eta_s: share of the way to the denoised state that the auxiliary action is to go."""
    noise_level: float = 0.1
    """sigma*: the blur of the density, in units of the data's spread."""
    steps: int = 1
    """Correction steps N."""
    max_norm: float = 0.2
    """Bound on one step, times sqrt(A) for A actions; .inf for none."""
    form: str = "delta"
    """How states correct: `delta`, `plain` or `convex`."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        for name in ("action_weight", "state_weight"):
            check.at_least(f"corrector.{name}", getattr(self, name), 0.0)
        check.positive("corrector.noise_level", self.noise_level)
        check.at_least("corrector.steps", self.steps, 0)
        check.at_least("corrector.max_norm", self.max_norm, 0.0, infinite=True)
        check.one_of("corrector.form", self.form, FORMS)

    @property
    def changes_nothing(self) -> bool:
        """Whether actions stay what they are."""
        return self.steps == 0 or (self.action_weight == 0.0 and self.state_weight == 0.0)


class InverseModel(Protocol):
    """What tells the action between two states."""

    def __call__(self, observation: Tensor, following: Tensor) -> Tensor:
        """Return actions ``[..., A]`` from raw states ``[..., d]`` to those behind them."""
        ...


class ScoreCorrector(nn.Module):
    """Nudges actions of any policy towards denser data; nothing here is trained or drawn.

    Args:
        score: Gradients of the data's density, learned or in closed form.
        inverse_dynamics: Turns displacements of states into actions; ``None`` where only actions
            are corrected.
    """

    def __init__(self, score: Score, inverse_dynamics: InverseModel | None = None) -> None:
        super().__init__()
        self.score = score
        self.inverse_dynamics = inverse_dynamics

    @torch.no_grad()
    def correct(
        self, observation: Tensor, action: Tensor, settings: CorrectionSettings
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return corrected actions, and what was done to each row.

        With nothing to do (both weights 0, or no step) it is ``action`` itself, and no network is
        asked.

        Args:
            observation: Raw states ``[..., d]``.
            action: The policy's actions ``[..., A]``; what lies outside [-1, 1] is clipped first.
            settings: How.

        Returns:
            Actions ``[..., A]`` in [-1, 1], and ``[...]`` each: ``correction``, the distance to the
            policy's action; ``action_step`` and ``state_step``, the lengths of both components
            before the bound, summed over steps; and, unless nothing was to be done,
            ``support_before`` and ``support_after``, the support distances at ``noise_level``.

        Raises:
            ConfigError: If states are to be corrected, and the models cannot.
        """
        nothing = action.new_zeros(action.shape[:-1])
        found = {"correction": nothing, "action_step": nothing, "state_step": nothing}
        if settings.changes_nothing:
            return action, found
        sigma = settings.noise_level
        start = action = action.clamp(-1.0, 1.0)  # as the environment does with a Gaussian's
        bound = settings.max_norm * math.sqrt(action.shape[-1])
        seen = self.score.denoise(observation, action, sigma)
        found["support_before"] = seen.support
        for _ in range(settings.steps):
            by_action = settings.action_weight * seen.action
            by_state = self._auxiliary(observation, action, seen.state, settings)
            action = (action + bounded(by_action + by_state, bound)).clamp(-1.0, 1.0)
            found["action_step"] = found["action_step"] + _length(by_action)
            found["state_step"] = found["state_step"] + _length(by_state)
            seen = self.score.denoise(observation, action, sigma)
        found["support_after"] = seen.support
        found["correction"] = _length(action - start)
        return action, found

    def _auxiliary(
        self,
        observation: Tensor,
        action: Tensor,
        displacement: Tensor | None,
        settings: CorrectionSettings,
    ) -> Tensor:
        """Return ``d_s`` ``[..., A]``."""
        weight, inverse = settings.state_weight, self.inverse_dynamics
        if weight == 0.0:
            return torch.zeros_like(action)
        if displacement is None or inverse is None:
            raise ConfigError(
                f"corrector.state_weight = {weight!r}: this corrector knows no gradient of states; "
                "set corrector.state_weight=0, or train one with agent.noise_on=joint"
            )
        if settings.form == "delta":
            shifted = inverse(observation, observation + weight * displacement)
            return shifted - inverse(observation, observation)
        auxiliary = inverse(observation, observation + displacement)
        return weight * (auxiliary if settings.form == "plain" else auxiliary - action)


def bounded(vector: Tensor, length: float) -> Tensor:
    """Return vectors ``[..., A]`` shortened to ``length`` where they are longer."""
    norm = _length(vector).unsqueeze(-1)
    return torch.where(norm > length, vector * (length / norm.clamp_min(1e-30)), vector)


def _length(vector: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vector, dim=-1)


def climb(
    score: Score, observation: Tensor, action: Tensor, levels: tuple[float, ...] | list[float]
) -> Tensor:
    """Return actions moved to denser ones by a full Tweedie step at each level in turn.

    A deterministic ascent, without the noise of Langevin dynamics: from a coarse view of the
    density to a fine one it ends near a mode of the actions at that state. Between two modes that
    are mirror images it stays where it is, on the saddle.

    Args:
        score: Gradients of the data's density.
        observation: Raw states ``[..., d]``.
        action: Where to begin, ``[..., A]``.
        levels: Noise levels, highest first.
    """
    for sigma in levels:
        action = (action + score.denoise(observation, action, sigma).action).clamp(-1.0, 1.0)
    return action
