"""Noise schedules of diffusion policies, and the coefficients of their sampling steps.

A schedule lists noise levels; level i mixes ``x_i = sqrt(abar_i) a + sqrt(1 - abar_i) eps``.
Levels count upwards from the cleanest, as in diffusers, and sampling visits them downwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from genpol.errors import ConfigError
from genpol.settings import one_of

Prediction = Literal["epsilon", "epsilon_delta", "sample", "v_prediction"]
Sampler = Literal["ddim", "ddim_unclipped", "ddpm"]
PREDICTIONS = ("epsilon", "epsilon_delta", "sample", "v_prediction")
SAMPLERS = ("ddim", "ddim_unclipped", "ddpm")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Noise levels and the order in which sampling visits them.

    Attributes:
        alpha_bar: Signal power of each of the T levels, cleanest first, each in (0, 1].
        time: What the network is told at each level: a share in [0, 1], or the level itself.
        steps: Levels at which sampling evaluates the network, noisiest first.
        final_alpha_bar: Signal power behind the last step.
    """

    alpha_bar: tuple[float, ...]
    time: tuple[float, ...]
    steps: tuple[int, ...]
    final_alpha_bar: float = 1.0

    def subset(self, num_steps: int) -> tuple[int, ...]:
        """Return ``num_steps`` of the sampling levels, evenly spread from the noisiest down.

        Raises:
            ConfigError: If the schedule has fewer levels than that.
        """
        total = len(self.steps)
        if not 1 <= num_steps <= total:
            raise ConfigError(
                f"num_steps = {num_steps}: must lie in [1, {total}] for this schedule"
            )
        return tuple(self.steps[index * total // num_steps] for index in range(num_steps))


def diffusers_schedule(
    betas: Literal["squaredcos_cap_v2", "linear"] = "squaredcos_cap_v2",
    *,
    num_levels: int = 100,
    num_steps: int = 10,
    spacing: Literal["trailing", "leading"] = "trailing",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
) -> Schedule:
    """Read a schedule off diffusers' ``DDIMScheduler`` (its ``DDPMScheduler`` has the same one).

    Args:
        betas: Name of the beta schedule. GoRL's first linear schedule is ``"linear"`` with 10
            levels and 10 steps.
        num_levels: Levels T of training.
        num_steps: Sampling steps; must divide ``num_levels``, or diffusers' own step sizes would
            not lead from one visited level to the next.
        spacing: ``"trailing"`` starts at the noisiest level; ``"leading"``, diffusers' default,
            starts T/K - 1 levels below it although the sample starts from pure noise.
        beta_start: First beta of ``"linear"``.
        beta_end: Last beta of ``"linear"``.

    Raises:
        ConfigError: If ``num_steps`` does not divide ``num_levels``.
    """
    if num_steps < 1 or num_levels % num_steps:
        raise ConfigError(f"num_steps = {num_steps}: must divide num_levels = {num_levels}")
    # Importing diffusers takes seconds, and only this function needs it.
    from diffusers import DDIMScheduler

    scheduler: Any = DDIMScheduler(
        num_train_timesteps=num_levels,
        beta_schedule=betas,
        beta_start=beta_start,
        beta_end=beta_end,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(num_steps)
    return Schedule(
        alpha_bar=tuple(scheduler.alphas_cumprod.tolist()),
        time=tuple(level / num_levels for level in range(num_levels)),
        steps=tuple(scheduler.timesteps.tolist()),
        final_alpha_bar=float(scheduler.final_alpha_cumprod),
    )


def gorl_cosine_schedule(num_levels: int = 10) -> Schedule:
    """Return GoRL's cosine schedule for direct epsilon prediction (code of the first version).

    ``abar_i = f(i) / f(0)`` with ``f(i) = cos^2((i/T + 0.008) / 1.008 * pi/2)``, i = 0 .. T-1, so
    level 0 is clean; sampling takes T - 1 steps from level T - 1 down to it.
    """
    f = [math.cos((i / num_levels + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(num_levels)]
    return Schedule(
        alpha_bar=tuple(value / f[0] for value in f),
        time=tuple(level / num_levels for level in range(num_levels)),
        steps=tuple(range(num_levels - 1, 0, -1)),
    )


def gorl_linear_schedule(num_levels: int = 10, *, smallest: float = 1e-3) -> Schedule:
    """Return GoRL's schedule ``abar(t) = smallest + (1 - smallest) (1 - t)`` (ICML code).

    Times are 1/T .. 1 and sampling visits them all; meant for ``epsilon_delta`` prediction.
    """
    time = tuple((level + 1) / num_levels for level in range(num_levels))
    return Schedule(
        alpha_bar=tuple(smallest + (1.0 - smallest) * (1.0 - t) for t in time),
        time=time,
        steps=tuple(range(num_levels - 1, -1, -1)),
    )


class DenoisingStep(NamedTuple):
    """Coefficients of one sampling step from ``x`` with network output ``o``.

    Clean estimate ``clean_x x + clean_o o``, possibly clipped; transition mean
    ``mean_x x + mean_clean clean + mean_o o``. Without clipping the mean is
    ``direct_x x + direct_o o``. ``time`` is the share of the action in x, from 0 (noise) to 1:
    where x is ``signal a + spread eps``, it is ``signal / (signal + spread)``, the time of a flow's
    path.
    """

    level: int
    clean_x: float
    clean_o: float
    mean_x: float
    mean_clean: float
    direct_x: float
    direct_o: float
    std: float
    time: float
    mean_o: float = 0.0


def delta_slopes(schedule: Schedule) -> tuple[float, ...]:
    """Return ``kappa_i`` of the prediction ``delta = eps - kappa_i x`` for every level.

    With ``r = sqrt(abar' / abar)`` and ``c = sqrt(1 - abar') - r sqrt(1 - abar)`` a DDIM step to
    the level below is ``r x + c eps``; ``kappa = (1 - r) / c`` makes it ``x + c delta``, so a zero
    network is the identity (GoRL, ICML code).
    """
    below = (schedule.final_alpha_bar, *schedule.alpha_bar[:-1])
    slopes = []
    for abar, previous in zip(schedule.alpha_bar, below, strict=True):
        r = math.sqrt(previous / abar)
        c = math.sqrt(1.0 - previous) - r * math.sqrt(1.0 - abar)
        slopes.append((1.0 - r) / c if c else 0.0)
    return tuple(slopes)


def denoising_steps(
    schedule: Schedule,
    *,
    prediction: Prediction = "epsilon",
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    levels: Sequence[int] | None = None,
) -> list[DenoisingStep]:
    """Compute the coefficients of all sampling steps, in double precision.

    Sources: DDIM, arXiv 2010.02502, equations 12 and 16, with epsilon recomputed from the clipped
    clean estimate (diffusers' ``use_clipped_model_output``) or, ``ddim_unclipped``, as it was
    before the clip, which is diffusers' default; DDPM, arXiv 2006.11239, equation 7 with the
    posterior variance ("fixed_small").

    Args:
        schedule: The noise levels.
        prediction: What the network's output means.
        sampler: Which transition kernel.
        eta: Noise of DDIM, from 0 (none) to 1 (as much as DDPM).
        levels: Levels to visit, noisiest first; by default those of the schedule.

    Raises:
        ConfigError: If a visited level is free of noise.
    """
    one_of("prediction", prediction, PREDICTIONS)
    one_of("sampler", sampler, SAMPLERS)
    levels = schedule.steps if levels is None else levels
    slopes = delta_slopes(schedule)
    onwards = [*(schedule.alpha_bar[level] for level in levels[1:]), schedule.final_alpha_bar]
    steps = []
    for level, following in zip(levels, onwards, strict=True):
        abar = schedule.alpha_bar[level]
        if abar >= 1.0:
            raise ConfigError(f"schedule.steps visits level {level}: it has no noise to remove")
        slope = slopes[level] if prediction == "epsilon_delta" else 0.0
        clean_x, clean_o = _clean_coefficients(abar, prediction, slope)
        mean_x, mean_clean, std = _kernel(abar, following, sampler, eta)
        # Step by step these two cancel badly where abar is small, hence the doubles.
        direct_x, direct_o = mean_x + mean_clean * clean_x, mean_clean * clean_o
        mean_o = 0.0
        if sampler == "ddim_unclipped":  # epsilon's share of the mean is x's and the output's
            mean_clean = math.sqrt(following)
            mean_x, mean_o = direct_x - mean_clean * clean_x, direct_o - mean_clean * clean_o
        signal, spread = math.sqrt(abar), math.sqrt(1.0 - abar)
        step = (clean_x, clean_o, mean_x, mean_clean, direct_x, direct_o, std)
        time = signal / (signal + spread)
        steps.append(DenoisingStep(level, *step, time=time, mean_o=mean_o))
    return steps


def _clean_coefficients(abar: float, prediction: Prediction, slope: float) -> tuple[float, float]:
    signal, noise = math.sqrt(abar), math.sqrt(1.0 - abar)
    if prediction == "sample":
        return 0.0, 1.0
    if prediction == "v_prediction":
        return signal, -noise
    return (1.0 - noise * slope) / signal, -noise / signal


def _kernel(
    abar: float, following: float, sampler: Sampler, eta: float
) -> tuple[float, float, float]:
    """Return the transition's weights of ``x`` and of the clean estimate, and its std."""
    beta = 1.0 - abar / following
    posterior = math.sqrt((1.0 - following) / (1.0 - abar) * beta)
    if sampler == "ddpm":
        mean_x = math.sqrt(abar / following) * (1.0 - following) / (1.0 - abar)
        return mean_x, math.sqrt(following) * beta / (1.0 - abar), posterior
    std = eta * posterior
    direction = math.sqrt(max(1.0 - following - std**2, 0.0))
    mean_x = direction / math.sqrt(1.0 - abar)
    return mean_x, math.sqrt(following) - mean_x * math.sqrt(abar), std
