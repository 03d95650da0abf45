"""Diffusion policy: DDIM and DDPM sampling over precomputed coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genpol.nn.normalizer import RunningNormalizer
from genpol.policies.denoiser import (
    Denoiser,
    DenoisingNetwork,
    Field,
    clean_rows,
    flatten_chunk,
    regression_loss,
    unflatten_chunk,
)
from genpol.policies.gaussian import log_prob
from genpol.policies.schedules import (
    DenoisingStep,
    Prediction,
    Sampler,
    Schedule,
    delta_slopes,
    denoising_steps,
)
from genpol.settings import at_least, within

# Keeps score and noise estimate finite at a level without noise.
SMALLEST_NOISE_POWER = 1e-6


class DiffusionPolicy(nn.Module):
    """A policy that denoises N(0, I) into actions.

    The verbs are those of :class:`~genpol.policies.flow.FlowPolicy`, except that "time" is the
    integer noise level ``[..., 1]`` of the schedule (0 is the cleanest).

    Args:
        observation_dim: Width of the observation.
        action_dim: Width A of one action.
        hidden: Widths of the network's hidden layers.
        schedule: Noise levels, from :mod:`genpol.policies.schedules`.
        prediction: ``"epsilon"``, ``"sample"``, ``"v_prediction"``, or GoRL's ``"epsilon_delta"``,
            with which a zero network sampling every level by DDIM is the identity.
        sampler: ``"ddim"``, ``"ddim_unclipped"`` or ``"ddpm"``; see
            :func:`~genpol.policies.schedules.denoising_steps`.
        eta: Noise of DDIM, 0 for a deterministic sampler.
        clip: Bound on the absolute clean estimate in every step; ``None`` for none.
        horizon: Actions H per chunk. Above 1 every action and noise is ``[..., H, A]``.
        time_embedding_dim: See :class:`~genpol.nn.time_embedding.TimeEmbedding`.
        activation: See :class:`~genpol.nn.mlp.MLP`.
        layer_norm: See :class:`~genpol.nn.mlp.MLP`.
        init: See :class:`~genpol.nn.mlp.MLP`.
        zero_init: Start with a zero output.
        output_scale: Constant factor on the network's output (0.25 in GoRL's ``epsilon_delta``).
        generator: Source of the initial weights.
        network: Used instead of the MLP that ``hidden`` and those from ``time_embedding_dim`` on
            describe.

    Attributes:
        normalizer: Observation statistics, to be updated or set by whoever owns the data.
        action_shape: Trailing shape of actions and noise: ``(A,)`` or ``(H, A)``.
        num_steps: Default number of sampling steps.
        num_draws: Draws of noise that a sample takes: one, or 1 + K where the K steps have noise.
        past_steps: See :class:`~genpol.policies.denoiser.DenoisingNetwork`.
    """

    alpha_bar: Tensor
    level_time: Tensor
    slope: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        *,
        schedule: Schedule,
        prediction: Prediction = "epsilon",
        sampler: Sampler = "ddim",
        eta: float = 0.0,
        clip: float | None = None,
        horizon: int = 1,
        time_embedding_dim: int = 8,
        activation: str = "silu",
        layer_norm: str = "none",
        init: str = "lecun",
        zero_init: bool = True,
        output_scale: float = 1.0,
        generator: torch.Generator | None = None,
        network: DenoisingNetwork | None = None,
    ) -> None:
        super().__init__()
        at_least("horizon", horizon, 1)
        within("eta", eta, 0.0, 1.0)
        self.schedule = schedule
        self.prediction: Prediction = prediction
        self.sampler: Sampler = sampler
        self.eta = eta
        self.clip = clip
        self.horizon = horizon
        self.num_steps = len(schedule.steps)
        self.action_shape = (horizon, action_dim) if horizon > 1 else (action_dim,)
        # Plain numbers, not buffers: indexing a tensor in the loop costs more than the arithmetic.
        self.steps = self._steps(schedule.steps)
        self.num_draws = 1 + self.num_steps * any(step.std > 0 for step in self.steps)
        self.normalizer = RunningNormalizer(observation_dim)
        self.denoiser: DenoisingNetwork = (
            network
            if network is not None
            else Denoiser(
                observation_dim,
                horizon * action_dim,
                hidden,
                time_embedding_dim=time_embedding_dim,
                activation=activation,
                layer_norm=layer_norm,
                init=init,
                zero_init=zero_init,
                output_scale=output_scale,
                generator=generator,
            )
        )
        self.past_steps = self.denoiser.past_steps
        slopes = delta_slopes(schedule) if prediction == "epsilon_delta" else (0.0,)
        self.register_buffer("alpha_bar", torch.tensor(schedule.alpha_bar), persistent=False)
        self.register_buffer("level_time", torch.tensor(schedule.time), persistent=False)
        self.register_buffer(
            "slope", torch.tensor(slopes).expand_as(self.alpha_bar).clone(), persistent=False
        )

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew and forget the observation statistics."""
        self.denoiser.reset_parameters(generator)
        self.normalizer.reset()

    def field(self, observation: Tensor, num_steps: int | None = None) -> Field:
        """Return the network on the sampler's levels with all that is independent of x computed."""
        levels = self.schedule.steps if num_steps is None else self.schedule.subset(num_steps)
        times = self.level_time[list(levels)].unsqueeze(-1)
        return self.denoiser.on_grid(self.normalizer(observation), times)

    def sample(
        self,
        observation: Tensor,
        noise: Tensor,
        step_noise: Tensor | None = None,
        *,
        num_steps: int | None = None,
    ) -> Tensor:
        """Denoise ``noise`` into an action of the same shape.

        Args:
            observation: Raw observations ``[..., d]``.
            noise: Standard normal draws, ``[..., A]`` or ``[..., H, A]``.
            step_noise: Draws of the K steps, ``[..., K, A]`` or ``[..., K, H, A]``, for DDPM and
                for ``eta > 0``. Without it every step takes its mean.
            num_steps: Visit only so many of the schedule's levels.
        """
        steps = self.sampling_steps(num_steps)
        draws = None if step_noise is None else flatten_chunk(step_noise, self.horizon).unbind(-2)
        x = denoise(
            self.field(observation, num_steps),
            flatten_chunk(noise, self.horizon),
            steps,
            draws,
            clip=self.clip,
        )[-1]
        return unflatten_chunk(x, self.horizon)

    def sampling_steps(self, num_steps: int | None = None) -> list[DenoisingStep]:
        """Return the steps of :meth:`sample`, which :meth:`field` is evaluated at."""
        return self.steps if num_steps is None else self._steps(self.schedule.subset(num_steps))

    def draw_time(
        self,
        shape: Sequence[int],
        generator: torch.Generator,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw training levels uniformly, int64 ``[*shape, 1]``."""
        device = device or generator.device
        levels = len(self.schedule.alpha_bar)
        return torch.randint(levels, (*shape, 1), generator=generator, device=device)

    def bc_loss(
        self,
        observation: Tensor,
        action: Tensor,
        noise: Tensor,
        time: Tensor,
        *,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the denoising loss: mean squared error on what the network predicts.

        Args:
            observation: Raw observations ``[..., d]``.
            action: Targets, ``[..., A]`` or ``[..., H, A]``.
            noise: Standard normal draws that broadcast with ``action``, as ``[K, B, A]`` may.
            time: Noise levels ``[..., 1]`` from :meth:`draw_time`.
            weight: One weight per action vector; see
                :meth:`~genpol.policies.flow.FlowPolicy.bc_loss`.
        """
        a = flatten_chunk(clean_rows(action, weight), self.horizon)
        eps = flatten_chunk(noise, self.horizon)
        signal, spread = self.mixture(time)
        x = signal * a + spread * eps
        target = {
            "epsilon": eps,
            "epsilon_delta": eps - self.slope[time] * x,
            "sample": a,
            "v_prediction": signal * eps - spread * a,
        }[self.prediction]
        return regression_loss(self._output(observation, x, time), target, self.horizon, weight)

    def mixture(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of action and noise at noise levels ``time`` ``[..., 1]``."""
        abar = self.alpha_bar[time]
        return abar.sqrt(), (1.0 - abar).sqrt()

    def noise_estimate(self, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Return ``E[eps | x]`` at noise levels ``time`` ``[..., 1]``."""
        flat = flatten_chunk(x, self.horizon)
        return unflatten_chunk(self._noise(observation, flat, time), self.horizon)

    def score(self, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Return the score of level ``time``, ``-E[eps | x] / sqrt(1 - abar)``.

        At a level without noise, ``1 - abar`` is taken as ``SMALLEST_NOISE_POWER``.
        """
        flat = flatten_chunk(x, self.horizon)
        spread = self.mixture(time)[1].clamp_min(SMALLEST_NOISE_POWER**0.5)
        out = -self._noise(observation, flat, time) / spread
        return unflatten_chunk(out, self.horizon)

    def denoised(self, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Return ``E[a | x]`` at noise levels ``time`` ``[..., 1]``, unclipped."""
        flat = flatten_chunk(x, self.horizon)
        signal, spread = self.mixture(time)
        out = (flat - spread * self._noise(observation, flat, time)) / signal
        return unflatten_chunk(out, self.horizon)

    def chain(self, observation: Tensor, noise: Tensor, step_noise: Tensor, sigma: float) -> Tensor:
        """Sample the denoising chain with standard deviations ``max(std_k, sigma)`` (DPPO).

        Args:
            observation: Raw observations ``[..., d]``.
            noise: Start of the chain, ``[..., A]`` or ``[..., H, A]``.
            step_noise: Draws of all K steps, ``[..., K, A]`` or ``[..., K, H, A]``.
            sigma: Floor of the standard deviation; it sets the exploration, the last step's above
                all, which has no noise of its own.

        Returns:
            States ``[..., K + 1, A]`` or ``[..., K + 1, H, A]``; the last is the action.
        """
        states = denoise(
            self.field(observation),
            flatten_chunk(noise, self.horizon),
            self.steps,
            flatten_chunk(step_noise, self.horizon).unbind(-2),
            clip=self.clip,
            smallest_std=sigma,
        )
        return unflatten_chunk(torch.stack(states, dim=-2), self.horizon)

    def chain_log_prob(self, observation: Tensor, chain: Tensor, sigma: float) -> Tensor:
        """Return the log-density of each transition of :meth:`chain`, ``[..., K]``.

        Summed over action dimensions, not over steps; the initial noise is left out. Steps without
        noise count 0.
        """
        states = flatten_chunk(chain, self.horizon)
        mean, std = self.chain_transitions(observation, chain, sigma)
        random = std > 0
        density = log_prob(mean, torch.where(random, std, 1.0), states[..., 1:, :])
        return torch.where(random.squeeze(-1), density, 0.0)

    def chain_transitions(
        self, observation: Tensor, chain: Tensor, sigma: float
    ) -> tuple[Tensor, Tensor]:
        """Return means ``[..., K, H * A]`` and standard deviations ``[K, 1]`` of the steps."""
        x = flatten_chunk(chain, self.horizon)[..., :-1, :]
        table = torch.tensor([step[1:] for step in self.steps], device=x.device, dtype=x.dtype)
        step = DenoisingStep(0, *table.unsqueeze(-1).unbind(1))  # type: ignore[arg-type]
        if all(own.mean_o == 0.0 for own in self.steps):
            step = step._replace(mean_o=0.0)
        levels = torch.tensor([step.level for step in self.steps], device=x.device).unsqueeze(-1)
        output = self._output(observation.unsqueeze(-2), x, levels)
        std = torch.as_tensor(step.std).clamp_min(sigma)
        return transition_mean(x, output, step, self.clip), std

    def _steps(self, levels: Sequence[int]) -> list[DenoisingStep]:
        return denoising_steps(
            self.schedule,
            prediction=self.prediction,
            sampler=self.sampler,
            eta=self.eta,
            levels=levels,
        )

    def _output(self, observation: Tensor, flat: Tensor, level: Tensor) -> Tensor:
        out: Tensor = self.denoiser(self.normalizer(observation), flat, self.level_time[level])
        return out

    def _noise(self, observation: Tensor, flat: Tensor, level: Tensor) -> Tensor:
        output = self._output(observation, flat, level)
        signal, spread = self.mixture(level)
        if self.prediction == "sample":
            return (flat - signal * output) / spread.clamp_min(SMALLEST_NOISE_POWER**0.5)
        if self.prediction == "v_prediction":
            return signal * output + spread * flat
        return output + self.slope[level] * flat


def transition_mean(x: Tensor, output: Tensor, step: DenoisingStep, clip: float | None) -> Tensor:
    """Return the mean of one denoising transition, with the clean estimate clipped if asked."""
    if clip is None:
        return step.direct_x * x + step.direct_o * output
    clean = (step.clean_x * x + step.clean_o * output).clamp(-clip, clip)
    mean = step.mean_x * x + step.mean_clean * clean
    if isinstance(step.mean_o, float) and step.mean_o == 0.0:
        return mean
    return mean + step.mean_o * output


def denoise(
    field: Field,
    noise: Tensor,
    steps: Sequence[DenoisingStep],
    draws: Sequence[Tensor] | None = None,
    *,
    clip: float | None = None,
    smallest_std: float = 0.0,
) -> list[Tensor]:
    """Run the sampling steps from ``noise`` ``[..., D]``; returns all states, ``noise`` first.

    Args:
        field: The network's output at each step.
        noise: Initial state.
        steps: From :func:`~genpol.policies.schedules.denoising_steps`.
        draws: Standard normal draws, one ``[..., D]`` per step; without them no noise is added.
        clip: Bound on the absolute clean estimate.
        smallest_std: Floor of the added noise's standard deviation.
    """
    x, states = noise, [noise]
    for index, step in enumerate(steps):
        x = transition_mean(x, field(x, index), step, clip)
        if draws is not None:
            x = x + max(step.std, smallest_std) * draws[index]
        states.append(x)
    return states
