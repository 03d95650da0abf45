"""A flow whose steps have learned noise, which makes its sampling a stochastic policy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from genpol.nn.mlp import MLP
from genpol.nn.normalizer import RunningNormalizer
from genpol.policies.denoiser import flatten_chunk, unflatten_chunk
from genpol.policies.flow import FlowPolicy, time_grid
from genpol.settings import positive


class NoisyFlow(nn.Module):
    """``x_{i+1} ~ N(x_i + v(s, x_i, t_i) / K, sigma(s, t_i)^2)`` (ReinFlow, 2505.22094).

    The noise network is trained with the flow and left out where it is deployed. ``log sigma`` runs
    between its bounds as a tanh of the network's output. Steps, sampler and scorer have the same
    times ``i / K``; the released code samples on another grid than it scores.

    Attributes:
        flow: The policy that is deployed.
        noise_net: Of the standard deviations.

    Args:
        flow: A flow policy.
        observation_dim: Width of the observation.
        hidden: Widths of the noise network's hidden layers.
        sigma_min: Least standard deviation of a step.
        sigma_max: Greatest.
        generator: Source of the noise network's initial weights.
    """

    def __init__(
        self,
        flow: FlowPolicy,
        observation_dim: int,
        hidden: Sequence[int],
        *,
        sigma_min: float,
        sigma_max: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        positive("sigma_min", sigma_min)
        positive("sigma_max", sigma_max)
        self.flow = flow
        self.horizon = flow.horizon
        self.num_steps = flow.num_steps
        self.action_shape = flow.action_shape
        self._bounds = (math.log(sigma_min), math.log(sigma_max))
        width = math.prod(flow.action_shape)
        # It starts in the middle of its range, in logarithms, for every state.
        self.noise_net = MLP(
            observation_dim + 1, width, hidden, output_gain=0.0, generator=generator
        )

    @property
    def normalizer(self) -> RunningNormalizer:
        """Observation statistics of the flow."""
        return self.flow.normalizer

    @normalizer.setter
    def normalizer(self, normalizer: RunningNormalizer) -> None:
        self.flow.normalizer = normalizer

    def std(self, observation: Tensor, num_steps: int | None = None) -> Tensor:
        """Return the standard deviations of all steps, ``[..., K, D]`` of flattened actions."""
        time = time_grid(num_steps or self.num_steps)[:-1].to(observation)
        seen = self.normalizer(observation).unsqueeze(-2)
        seen = seen.expand(*seen.shape[:-2], len(time), seen.shape[-1])
        together = torch.cat((seen, time.expand(*seen.shape[:-1], 1)), dim=-1)
        low, high = self._bounds
        raw: Tensor = self.noise_net(together)
        return (low + 0.5 * (high - low) * (torch.tanh(raw) + 1.0)).exp()

    def sample(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Return what the flow makes of ``noise``, without further noise."""
        return self.flow.sample(observation, noise)

    def chain(self, observation: Tensor, noise: Tensor, step_noise: Tensor) -> Tensor:
        """Sample a chain; returns its states ``[..., K + 1, *action_shape]``.

        Args:
            observation: Raw observations ``[..., d]``.
            noise: Start of the chain, ``[..., *action_shape]``.
            step_noise: Standard normal draws ``[..., K, *action_shape]``.
        """
        draws = flatten_chunk(step_noise, self.horizon)
        field, std = self.flow.field(observation), self.std(observation)
        x = flatten_chunk(noise, self.horizon)
        states = [x]
        for step in range(self.num_steps):
            x = x + field(x, step) / self.num_steps + std[..., step, :] * draws[..., step, :]
            states.append(x)
        return unflatten_chunk(torch.stack(states, dim=-2), self.horizon)

    def chain_transitions(self, observation: Tensor, chain: Tensor) -> tuple[Tensor, Tensor]:
        """Return means and standard deviations ``[..., K, D]`` of the steps of a chain."""
        stillness = [0.0] * self.num_steps
        mean, _ = self.flow.chain_transitions(observation, chain, stillness, correction="none")
        return mean, self.std(observation)
