"""On-policy surrogate losses as pure functions of rows, and the small steps that feed them.

A surrogate takes ``log_ratio`` ``[...]``, the log-density under the current minus that under the
old policy as :func:`clamped_log_ratio` returns it; ``advantage`` of the same shape, constants; and
its own parameters by keyword. It returns the loss of each row ``[...]``, to be minimised. The
caller averages the rows with :func:`~genpol.nn.masked.weighted_mean`, whose weights also say which
rows count. In the formulas r is the ratio, l its logarithm and A the advantage; "ours" marks what
no source states. BPO has a module of its own, :mod:`genpol.objectives.bpo`; what chooses among rows
is in :mod:`genpol.objectives.selection`.

MHPO's hazard shrinks every gradient, at ratio 1 to 0.265 of the policy gradient; ``normalise``
divides it out.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genpol.errors import ConfigError

MAX_LOG_RATIO = 20.0


def clamped_log_ratio(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Return ``log pi - log pi_old`` ``[...]``, clamped to +-20 so that its exponential is finite.

    A row beyond the clamp has no gradient.
    """
    return (log_prob - old_log_prob).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


# -- PPO and PPO-EWMA ----------------------------------------------------------------------------


def ppo_clip(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float = 0.0,
) -> Tensor:
    """Return ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` (arXiv 1707.06347, equation 7).

    Args:
        log_ratio: See the module.
        advantage: See the module.
        clip_low: How far below 1 the ratio is rewarded.
        clip_high: How far above.
        dual_clip: If positive, the objective of rows with A < 0 is at least ``dual_clip A``
            (arXiv 1912.09729), so a huge ratio cannot dominate. Usual: 3.

    Raises:
        ConfigError: If ``dual_clip`` is neither 0 nor above 1, where it would cut useful gradient.
    """
    if dual_clip != 0.0 and not dual_clip > 1.0:
        raise ConfigError(f"dual_clip = {dual_clip!r}: must be 0 (off) or > 1, such as 3")
    ratio = log_ratio.exp()
    clipped = ratio.clamp_min(1.0 - clip_low).clamp_max(1.0 + clip_high)
    loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if dual_clip == 0.0:
        return loss
    return torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)


def ppo_ewma(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    log_proximal_ratio: Tensor,
    clip_low: float,
    clip_high: float,
    max_ratio: float = 100.0,
) -> Tensor:
    """Return PPO's loss with the trust region around a proximal policy p (arXiv 2110.00641).

    ``-min(r A, exp(clip(log pi/p, log(1 - clip_low), log(1 + clip_high))) p/b A)``, where b, the
    old policy, collected the data and r = pi/b corrects for that. With p = b it is
    :func:`ppo_clip`. The paper's KL form is :func:`mdpo` with half the square of ``log pi/p``.

    Args:
        log_ratio: See the module; against b.
        advantage: See the module.
        log_proximal_ratio: ``log p - log b`` ``[...]``, constants, from :func:`clamped_log_ratio`;
            p is usually the average kept by :class:`EWMA`.
        clip_low: How far below 1 the ratio to p is rewarded.
        clip_high: How far above.
        max_ratio: Rows of larger r are scaled down, value and gradient, as if r were this
            (released code: a floor under the log-density of b).
    """
    excess = (log_ratio.detach() - math.log(max_ratio)).clamp_min(0.0)
    proximal = log_ratio - log_proximal_ratio
    proximal = proximal.clamp(math.log1p(-clip_low), math.log1p(clip_high))
    ratio = (log_ratio - excess).exp()
    clipped = (proximal + log_proximal_ratio - excess).exp()
    return -torch.minimum(ratio * advantage, clipped * advantage)


class EWMA(nn.Module):
    """Exponentially weighted average of a module's weights, for :func:`ppo_ewma`.

    Bias-corrected (arXiv 2110.00641, released code): the given weights count once, then each
    :meth:`update` sets ``W <- d W + 1`` and ``theta_p <- theta_p + (theta - theta_p) / W``. The
    centre of mass lies ``d / (1 - d)`` updates back. ``state_dict`` holds weights and W.

    Args:
        module: The policy; :attr:`average` starts as a copy that takes no gradient.
        decay: The factor d in [0, 1).
    """

    total_weight: Tensor

    def __init__(self, module: nn.Module, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.average = copy.deepcopy(module).requires_grad_(False)
        device = next(module.parameters()).device
        self.register_buffer("total_weight", torch.ones((), device=device))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Take in the weights of ``module`` after a gradient step; its buffers are copied."""
        self.total_weight.mul_(self.decay).add_(1.0)
        share = self.total_weight.reciprocal()
        for average, new in zip(self.average.parameters(), module.parameters(), strict=True):
            average.lerp_(new, share.to(average.dtype))
        self.copy_buffers(module)

    @torch.no_grad()
    def copy_buffers(self, module: nn.Module) -> None:
        """Take over what is not averaged, such as observation statistics."""
        for kept, current in zip(self.average.buffers(), module.buffers(), strict=True):
            kept.copy_(current)


# -- MDPO ----------------------------------------------------------------------------------------


def mdpo(log_ratio: Tensor, advantage: Tensor, *, divergence: Tensor, step_size: float) -> Tensor:
    """Return ``-r A + divergence / step_size`` (on-policy MDPO, arXiv 2005.09814).

    Args:
        log_ratio: See the module.
        advantage: See the module; the paper standardises it over the whole batch.
        divergence: Of the current from the old policy, ``[...]``: the closed form of KL(new ||
            old) at each row's state, or :func:`tsallis_divergence`.
        step_size: The mirror step t, from :func:`mdpo_step_size`.
    """
    return divergence / step_size - log_ratio.exp() * advantage


def mdpo_step_size(
    iteration: int,
    total: int,
    *,
    form: str = "genpol",
    floor: float = 0.0,
) -> float:
    """Return the mirror step of an iteration, annealed linearly (arXiv 2005.09814).

    Args:
        iteration: Counted from 0.
        total: Number of iterations, K.
        form: ``"genpol"`` goes from 1 to 1/K; ``"released"``, the authors' code, from ``1 + 1/K``
            to 2/K.
        floor: Smallest step; without one, the policy all but stops at the end.

    Raises:
        ConfigError: If the form is unknown, or if the step would not be positive.
    """
    if form not in ("genpol", "released"):
        raise ConfigError(f"mdpo form = {form!r}: must be one of genpol, released")
    elapsed = iteration if form == "genpol" else iteration - 1
    step_size = max(1.0 - elapsed / total, floor)
    if step_size <= 0.0:
        raise ConfigError(
            f"mdpo step size is 0 at iteration {iteration} of {total}: set a floor > 0 to go on"
        )
    return step_size


def tsallis_log(log_density: Tensor, index: float) -> Tensor:
    """Return ``log_q x = (x^(q - 1) - 1) / (q - 1)`` of densities given by their logarithm.

    ``index`` is q: at 1 the logarithm itself, at 2 ``x - 1`` (arXiv 2005.09814).
    """
    if index == 1.0:
        return log_density
    return torch.expm1((index - 1.0) * log_density) / (index - 1.0)


def tsallis_divergence(log_ratio: Tensor, old_log_prob: Tensor, *, index: float) -> Tensor:
    """Return rows whose mean under the old policy is the Tsallis divergence of new from old.

    That is, the Bregman divergence of ``sum pi log_q pi`` (arXiv 2005.09814): KL at q = 1, the
    squared distance at q = 2. Each row is ``pi_old^(q - 1) (r log_q r - (r - 1))``: the estimate
    weighted by the ratio, less what has mean zero, so it is never negative and its gradient
    vanishes at r = 1 row by row (ours; the authors' unweighted ``log_q pi - log_q pi_old`` is no
    divergence once the policy has moved).

    Args:
        log_ratio: See the module. Elementwise: joint densities of many dimensions to the power
            q - 1 explode, so there pass ``[..., A]`` per dimension and sum.
        old_log_prob: Log-densities under the old policy, of the same shape.
        index: The positive q.
    """
    rows = log_ratio.exp() * tsallis_log(log_ratio, index) - torch.expm1(log_ratio)
    return ((index - 1.0) * old_log_prob).exp() * rows


# -- R2VPO and MHPO ------------------------------------------------------------------------------


def r2vpo(
    log_ratio: Tensor, advantage: Tensor, *, multiplier: float | Tensor, delta: float
) -> Tensor:
    """Return ``-r A + multiplier ((r - 1)^2 - delta)`` (R2VPO, arXiv 2601.03320).

    The mean of ``(r - 1)^2`` is the chi-square divergence, about twice the KL. A row's gradient
    weight is ``r (A - 2 multiplier (r - 1))``: a brake instead of a clip.

    Args:
        log_ratio: See the module.
        advantage: See the module.
        multiplier: Lagrange multiplier, fixed or from :func:`r2vpo_multiplier`.
        delta: Bound on the mean of ``(r - 1)^2``.
    """
    return multiplier * (torch.expm1(log_ratio).square() - delta) - log_ratio.exp() * advantage


@torch.no_grad()
def r2vpo_multiplier(
    multiplier: Tensor, second_moment: Tensor, *, delta: float, rate: float, maximum: float
) -> Tensor:
    """Return ``clip(multiplier + rate (second_moment - delta), 0, maximum)``: dual ascent.

    Args:
        multiplier: The current one, ``[]``.
        second_moment: Mean of ``(r - 1)^2``, ``[]``, over an epoch rather than a minibatch.
        delta: Its bound.
        rate: Step size of the dual variable.
        maximum: Largest multiplier (ours).
    """
    return (multiplier + rate * (second_moment - delta)).clamp(0.0, maximum)


def mhpo(
    log_ratio: Tensor,
    advantage: Tensor,
    *,
    bound: float,
    up_power: float,
    up_scale: float,
    down_power: float,
    down_scale: float,
    normalise: bool = True,
) -> Tensor:
    """Return ``-exp(psi - sg(zeta)) A``, ``psi = c tanh(l / c)`` (MHPO, arXiv 2603.16929).

    The hazard ``zeta = (softplus(psi) / up_scale)^up_power + (softplus(-psi) / down_scale)^
    down_power`` damps both directions apart; sg stops its gradient, which could turn the sign.

    Args:
        log_ratio: See the module.
        advantage: See the module.
        bound: The c, in units of the log-density; the gradient is at most ``e^c`` times A. Paper:
            1.5; wide actions need more.
        up_power: Exponent for growing ratios (paper: 1.5).
        up_scale: Their scale (1.0).
        down_power: Exponent for shrinking ratios (2.0).
        down_scale: Their scale (0.8).
        normalise: Divide by ``exp(-zeta)`` at r = 1, so that there the gradient is the policy
            gradient (ours).
    """
    psi = bound * (log_ratio / bound).tanh()
    with torch.no_grad():
        up, down = F.softplus(psi) / up_scale, F.softplus(-psi) / down_scale
        hazard = up.pow(up_power) + down.pow(down_power)
    if normalise:
        rest = math.log(2.0)
        hazard = hazard - (rest / up_scale) ** up_power - (rest / down_scale) ** down_power
    return -(psi - hazard).exp() * advantage
