"""Flow-matching policy: ODE sampling, scores, and the SDE chain that finetuning needs.

Time runs forward, from noise at 0 to the action at 1; :mod:`genpol.policies` states the convention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from genpol.errors import ConfigError
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
from genpol.policies.schedules import DenoisingStep
from genpol.settings import at_least, one_of

Solver = Literal["euler", "heun"]
Correction = Literal["marginal", "official", "none"]
TimeGrid = Literal["left", "closed"]

TIME_GRIDS = ("left", "closed")

# (t v - x) / (1 - t) is 0/0 at t = 1, and an error e of the velocity enters it as t e / (1 - t).
LATEST_SCORE_TIME = 1.0 - 1e-3


class FlowPolicy(nn.Module):
    """A policy that transports N(0, I) to actions along a learned velocity field.

    Args:
        observation_dim: Width of the observation.
        action_dim: Width A of one action.
        hidden: Widths of the velocity network's hidden layers.
        horizon: Actions H per chunk. Above 1 every action and noise is ``[..., H, A]``.
        num_steps: Default number of solver steps.
        solver: ``"euler"``, or ``"heun"`` with two evaluations per step (the last at ``t = 1``).
        time_embedding_dim: See :class:`~genpol.nn.time_embedding.TimeEmbedding`.
        activation: See :class:`~genpol.nn.mlp.MLP`.
        layer_norm: See :class:`~genpol.nn.mlp.MLP`.
        init: See :class:`~genpol.nn.mlp.MLP`.
        zero_init: Start with zero velocity: a sample is its noise, bit for bit.
        output_scale: Constant factor on the network's output.
        generator: Source of the initial weights.
        network: Used instead of the MLP that ``hidden`` and those from ``time_embedding_dim`` on
            describe.
        spread: Times at which the network is asked, see :func:`time_grid`.
        state_clip: Bound on the absolute states behind every step of :meth:`sample`; guidance and
            chains, which have bounds of their own, leave it out.

    Attributes:
        normalizer: Observation statistics, to be updated or set by whoever owns the data.
        action_shape: Trailing shape of actions and noise: ``(A,)`` or ``(H, A)``.
        num_draws: Draws of noise that a sample takes: one.
        past_steps: See :class:`~genpol.policies.denoiser.DenoisingNetwork`.
    """

    grid: Tensor
    num_draws = 1

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        *,
        horizon: int = 1,
        num_steps: int = 10,
        solver: Solver = "euler",
        time_embedding_dim: int = 8,
        activation: str = "silu",
        layer_norm: str = "none",
        init: str = "lecun",
        zero_init: bool = True,
        output_scale: float = 1.0,
        generator: torch.Generator | None = None,
        network: DenoisingNetwork | None = None,
        spread: TimeGrid = "left",
        state_clip: float | None = None,
    ) -> None:
        super().__init__()
        at_least("horizon", horizon, 1)
        at_least("num_steps", num_steps, 1)
        one_of("solver", solver, ("euler", "heun"))
        one_of("spread", spread, TIME_GRIDS)
        self.horizon = horizon
        self.num_steps = num_steps
        self.solver: Solver = solver
        self.spread: TimeGrid = spread
        self.state_clip = state_clip
        self.action_shape = (horizon, action_dim) if horizon > 1 else (action_dim,)
        self.normalizer = RunningNormalizer(observation_dim)
        self.net: DenoisingNetwork = (
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
        self.past_steps = self.net.past_steps
        self.register_buffer("grid", time_grid(num_steps, spread), persistent=False)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew and forget the observation statistics."""
        self.net.reset_parameters(generator)
        self.normalizer.reset()

    def velocity(self, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Return the velocity at ``x`` ``[..., A]`` or ``[..., H, A]`` and times ``[..., 1]``."""
        flat = self._flat_velocity(observation, flatten_chunk(x, self.horizon), time)
        return unflatten_chunk(flat, self.horizon)

    def field(self, observation: Tensor, num_steps: int | None = None) -> Field:
        """Return the velocity on the solver's grid with all that does not depend on x computed.

        Guidance wraps this function and passes the result to :func:`integrate`. It works on
        flattened actions ``[..., H * A]``, at steps 0 to ``num_steps`` inclusive.
        """
        return self.net.on_grid(self.normalizer(observation), self._grid(num_steps))

    def sample(self, observation: Tensor, noise: Tensor, *, num_steps: int | None = None) -> Tensor:
        """Integrate the flow from ``noise`` to an action of the same shape.

        Nothing is squashed, nor clipped unless there is a ``state_clip``, and no step is
        stochastic. Gradients flow to observation, noise and weights unless they are switched off.
        """
        steps = self.num_steps if num_steps is None else num_steps
        at_least("num_steps", steps, 1)
        flat = flatten_chunk(noise, self.horizon)
        field = self.field(observation, num_steps)
        x = integrate(field, flat, steps, self.solver, clip=self.state_clip)
        return unflatten_chunk(x, self.horizon)

    def sampling_steps(self, num_steps: int | None = None) -> list[DenoisingStep]:
        """Return the Euler steps of :meth:`field`, in the form that diffusion models share."""
        return euler_steps(self.num_steps if num_steps is None else num_steps)

    @staticmethod
    def draw_time(
        shape: Sequence[int], generator: torch.Generator, device: torch.device | str | None = None
    ) -> Tensor:
        """Draw training times from U(0, 1), ``[*shape, 1]``."""
        return torch.rand((*shape, 1), generator=generator, device=device or generator.device)

    def bc_loss(
        self,
        observation: Tensor,
        action: Tensor,
        noise: Tensor,
        time: Tensor,
        *,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the flow-matching loss ``mean |v(s, x_t, t) - (a - eps)|^2`` over dims and rows.

        For K noise draws per row pass noise ``[K, B, A]`` and time ``[K, B, 1]`` with observation
        ``[B, d]`` and action ``[B, A]``.

        Args:
            observation: Raw observations ``[..., d]``.
            action: Targets, ``[..., A]`` or ``[..., H, A]``.
            noise: Standard normal draws that broadcast with ``action``.
            time: Times in [0, 1], ``[..., 1]``, with no dimension for the horizon.
            weight: One non-negative weight per action vector: ``[...]``, or for chunks ``[..., H]``
                (``[..., 1]`` weighs whole chunks). The loss is the weighted mean, so that a mask
                of zeros and ones averages what is valid. Actions of weight zero may be NaN.
        """
        a = flatten_chunk(clean_rows(action, weight), self.horizon)
        eps = flatten_chunk(noise, self.horizon)
        x = torch.lerp(eps, a, time)
        return regression_loss(
            self._flat_velocity(observation, x, time), a - eps, self.horizon, weight
        )

    @staticmethod
    def mixture(time: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights of action and noise at times ``[..., 1]``: ``t`` and ``1 - t``."""
        return time, 1.0 - time

    def score(self, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Return the score of the time-t marginal, ``(t v - x) / (1 - t)`` (exact, linear path).

        It follows from ``E[eps | x] = x - t v`` (Fisher Decorator, section on the score; OGPO,
        appendix E). At ``t = 1`` the quotient is 0/0, so times past ``LATEST_SCORE_TIME`` are
        evaluated there, which is the score of actions smoothed by noise of standard deviation
        1e-3. A learned velocity's error e becomes ``t e / (1 - t)``: times in [0.7, 0.95] serve.
        """
        t = time.clamp(max=LATEST_SCORE_TIME)
        flat = flatten_chunk(x, self.horizon)
        out = velocity_to_score(self._flat_velocity(observation, flat, t), flat, t)
        return unflatten_chunk(out, self.horizon)

    def denoised(self, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Return ``x + (1 - t) v``, the one-step estimate of the action, ``E[a | x_t]``."""
        flat = flatten_chunk(x, self.horizon)
        out = flat + (1.0 - time) * self._flat_velocity(observation, flat, time)
        return unflatten_chunk(out, self.horizon)

    def chain(
        self,
        observation: Tensor,
        noise: Tensor,
        step_noise: Tensor,
        sigma: float | Sequence[float],
        *,
        correction: Correction = "marginal",
        clip: float | None = None,
    ) -> Tensor:
        """Sample a stochastic chain from noise to action.

        Args:
            observation: Raw observations ``[..., d]``.
            noise: Start of the chain, ``[..., A]`` or ``[..., H, A]``.
            step_noise: Standard normal draws of the K steps, ``[..., K, A]`` or ``[..., K, H, A]``
                (clamp them to truncate the noise).
            sigma: A float ``s`` adds noise of standard deviation ``s sqrt(1 - t_i)`` at step i; a
                sequence gives the K standard deviations themselves.
            correction: See :func:`sde_steps`.
            clip: Bound on the absolute transition means, 1.0 in OGPO.

        Returns:
            States ``[..., K + 1, A]`` or ``[..., K + 1, H, A]``; the last is the action, unclipped.
        """
        draws = flatten_chunk(step_noise, self.horizon)
        states = sde_chain(
            self.field(observation, draws.shape[-2]),
            flatten_chunk(noise, self.horizon),
            draws,
            sde_steps(draws.shape[-2], sigma, correction),
            clip,
        )
        return unflatten_chunk(states, self.horizon)

    def chain_log_prob(
        self,
        observation: Tensor,
        chain: Tensor,
        sigma: float | Sequence[float],
        *,
        correction: Correction = "marginal",
        clip: float | None = None,
    ) -> Tensor:
        """Return the log-density of each transition of :meth:`chain`, ``[..., K]``.

        Summed over action dimensions, not over steps; the constant density of the initial noise is
        left out. Steps of zero sigma are deterministic and count 0. All steps are evaluated in one
        batch. The arguments are those of :meth:`chain`; gradients reach the weights.
        """
        states = flatten_chunk(chain, self.horizon)
        mean, std = self.chain_transitions(
            observation, chain, sigma, correction=correction, clip=clip
        )
        random = std > 0
        density = log_prob(mean, torch.where(random, std, 1.0), states[..., 1:, :])
        return torch.where(random.squeeze(-1), density, 0.0)

    def chain_transitions(
        self,
        observation: Tensor,
        chain: Tensor,
        sigma: float | Sequence[float],
        *,
        correction: Correction = "marginal",
        clip: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return means ``[..., K, H * A]`` and standard deviations ``[K, 1]`` of the steps."""
        x = flatten_chunk(chain, self.horizon)[..., :-1, :]
        steps = sde_steps(x.shape[-2], sigma, correction)
        time = self._grid(len(steps))[:-1]
        velocity = self._flat_velocity(observation.unsqueeze(-2), x, time)
        keep, gain, std = (
            torch.tensor(steps, device=x.device, dtype=x.dtype).unsqueeze(-1).unbind(1)
        )
        mean = keep * x + gain * velocity
        return (mean if clip is None else mean.clamp(-clip, clip)), std

    def _grid(self, num_steps: int | None) -> Tensor:
        if num_steps is None:
            return self.grid
        return time_grid(num_steps, self.spread).to(self.grid)

    def _flat_velocity(self, observation: Tensor, flat: Tensor, time: Tensor) -> Tensor:
        out: Tensor = self.net(self.normalizer(observation), flat, time)
        return out


def time_grid(num_steps: int, spread: TimeGrid = "left") -> Tensor:
    """Return the solver's times ``[num_steps + 1, 1]``, from 0 to 1.

    Args:
        num_steps: Steps K.
        spread: ``"left"``: ``i / K``, where each step begins. ``"closed"``: the K steps ask at
            ``i / (K - 1)``, the last of them at 1, as ReinFlow's code does.
    """
    if spread == "left":
        return (torch.arange(num_steps + 1) / num_steps).unsqueeze(-1)
    return torch.cat((torch.linspace(0.0, 1.0, num_steps), torch.ones(1))).unsqueeze(-1)


def euler_steps(num_steps: int) -> list[DenoisingStep]:
    """Return the steps ``x + v / K`` for a network that gives the velocity v.

    The clean estimate is ``x + (1 - t) v``, and a step goes ``1 / (K (1 - t))`` of the way to it.
    """
    steps = []
    for step in range(num_steps):
        left = 1.0 - step / num_steps
        share = 1.0 / (num_steps * left)
        steps.append(
            DenoisingStep(
                level=step,
                clean_x=1.0,
                clean_o=left,
                mean_x=1.0 - share,
                mean_clean=share,
                direct_x=1.0,
                direct_o=1.0 / num_steps,
                std=0.0,
                time=step / num_steps,
            )
        )
    return steps


def integrate(
    field: Field,
    noise: Tensor,
    num_steps: int,
    solver: Solver = "euler",
    *,
    clip: float | None = None,
) -> Tensor:
    """Solve ``dx/dt = field(x, step)`` from ``noise`` at t = 0 to t = 1 in equal steps.

    Args:
        field: The velocity.
        noise: Initial state ``[..., D]``.
        num_steps: Steps.
        solver: See :class:`FlowPolicy`.
        clip: Bound on the absolute state behind every step.
    """
    x, dt = noise, 1.0 / num_steps
    for step in range(num_steps):
        velocity = field(x, step)
        if solver == "heun":
            ahead = field(torch.add(x, velocity, alpha=dt), step + 1)
            velocity = 0.5 * (velocity + ahead)
        x = torch.add(x, velocity, alpha=dt)
        x = x if clip is None else x.clamp(-clip, clip)
    return x


def velocity_to_score(velocity: Tensor, x: Tensor, time: Tensor | float) -> Tensor:
    """Return ``(t v - x) / (1 - t)``, the score of the linear path's marginal at ``t < 1``."""
    return (time * velocity - x) / (1.0 - time)


class SdeStep(NamedTuple):
    """One transition ``x' = keep * x + gain * v + std * xi`` of the stochastic chain."""

    keep: float
    gain: float
    std: float


def sde_steps(
    num_steps: int, sigma: float | Sequence[float], correction: Correction = "marginal"
) -> list[SdeStep]:
    """Return the transitions of an Euler chain with added noise.

    The SDE ``dX = [v + g^2/2 score] dt + g dW`` has the marginals of the ODE for every g (OGPO,
    arXiv 2605.03065, section on flow policies). A step that adds noise of standard deviation
    ``sigma_i`` has ``g^2 dt = sigma_i^2``, hence with ``score = (t v - x) / (1 - t)`` the mean

        x + dt v + sigma_i^2 / 2 * (t_i v - x) / (1 - t_i).

    With ``sigma_i = s sqrt(1 - t_i)`` the last term is ``s^2 / 2 (t_i v - x)``: nothing blows up.

    Args:
        num_steps: Number of transitions K.
        sigma: ``s`` as above, or all K standard deviations. ``s / sqrt(K)`` is the Euler-Maruyama
            scheme of the continuous SDE with ``g = s sqrt(1 - t)``.
        correction: ``"marginal"`` is the mean above. ``"official"`` multiplies its correction by dt
            as OGPO's released code does, K times too little to keep the marginals. ``"none"`` has
            none, as in ReinFlow and in the flow version of DPPO.

    Raises:
        ConfigError: If the sequence has another length than ``num_steps``.
    """
    one_of("correction", correction, ("marginal", "official", "none"))
    dt = 1.0 / num_steps
    times = [step * dt for step in range(num_steps)]
    stds = [sigma * (1.0 - t) ** 0.5 for t in times] if isinstance(sigma, float | int) else sigma
    if len(stds) != num_steps:
        raise ConfigError(f"sigma has {len(stds)} entries: must have one per step, {num_steps}")
    share = {"marginal": 0.5, "official": 0.5 * dt, "none": 0.0}[correction]
    pulls = [share * float(std) ** 2 / (1.0 - t) for std, t in zip(stds, times, strict=True)]
    return [
        SdeStep(keep=1.0 - pull, gain=dt + pull * t, std=float(std))
        for pull, t, std in zip(pulls, times, stds, strict=True)
    ]


def sde_chain(
    field: Field,
    noise: Tensor,
    step_noise: Tensor,
    steps: Sequence[SdeStep],
    clip: float | None = None,
) -> Tensor:
    """Run the stochastic chain; returns all states ``[..., K + 1, D]``, ``noise`` first.

    Args:
        field: Velocity on the grid of K steps.
        noise: Initial state ``[..., D]``.
        step_noise: Standard normal draws ``[..., K, D]``.
        steps: From :func:`sde_steps`.
        clip: Bound on the absolute transition means.
    """
    x, states = noise, [noise]
    for index, (draw, step) in enumerate(zip(step_noise.unbind(-2), steps, strict=True)):
        mean = step.keep * x + step.gain * field(x, index)
        x = (mean if clip is None else mean.clamp(-clip, clip)) + step.std * draw
        states.append(x)
    return torch.stack(states, dim=-2)
