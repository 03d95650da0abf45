"""The conditional U-Net over a chunk's actions of Diffusion Policy (Chi et al., arXiv 2303.04137).

A chunk ``[H, A]`` is a signal of length H with A channels. Blocks of two convolutions, each behind
a group norm and Mish, read it at halved and halved lengths and back; observation and time scale and
shift the channels within every block (FiLM, arXiv 1709.07871). The structure is that of the
released code, which robomimic and LeRobot have, too: the widest length's skip connection is not
used, and the last norm has eight groups whatever the others have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from genpol.errors import ConfigError
from genpol.nn.mlp import initialise
from genpol.nn.time_embedding import TimeMLP
from genpol.policies.denoiser import DenoisingNetwork, Field

_LAST_GROUPS = 8


class ConditionalUnet1D(DenoisingNetwork):
    """A U-Net over the actions of a chunk, conditioned on observation and time.

    What it makes of times and observation is computed once for all steps of a sampler.

    **Actions of the past.** Policies with a history of N observations model chunks that begin with
    the oldest of them; the first N - 1 actions are past when the chunk is made. So that a chunk
    begins with what is done next, as everywhere in this library, those stand at its end here: the
    network is given the chunk rolled forward by ``past_steps``, and its output is rolled back.

    Args:
        observation_dim: Width of the (normalised) observation, with its history.
        action_dim: Width A of one action.
        horizon: Actions H of a chunk.
        channels: Channels at each length, the full one first.
        time_dim: Width of the embedded time.
        kernel_size: Of the convolutions; odd.
        groups: Of the norms; they divide all channels.
        scale: Whether channels are scaled; else only shifted.
        past_steps: See above.
        init: See :class:`~genpol.nn.mlp.MLP`.
        output_gain: Factor on the last convolution's initial weights.
        generator: Source of the initial weights.

    Raises:
        ConfigError: If horizon, channels, groups or kernel do not suit one another.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        horizon: int,
        channels: Sequence[int],
        *,
        time_dim: int = 128,
        kernel_size: int = 5,
        groups: int = 8,
        scale: bool = True,
        past_steps: int = 0,
        init: str = "lecun",
        output_gain: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _check(horizon, channels, kernel_size, groups, past_steps)
        self.past_steps = past_steps
        self.init = init
        self.output_gain = output_gain
        self._chunk = (horizon, action_dim)
        self._time_dim = time_dim
        self.embedding = TimeMLP(time_dim, 4 * time_dim)
        condition = time_dim + observation_dim
        options: dict[str, Any] = {"kernel_size": kernel_size, "groups": groups, "scale": scale}

        def pair(fan_in: int, fan_out: int, then: nn.Module) -> nn.ModuleList:
            first = _ResidualBlock(fan_in, fan_out, condition, **options)
            return nn.ModuleList(
                [first, _ResidualBlock(fan_out, fan_out, condition, **options), then]
            )

        widths, last = [action_dim, *channels], len(channels) - 1
        self.down = nn.ModuleList(
            pair(a, b, _halve(b) if i < last else nn.Identity())
            for i, (a, b) in enumerate(pairwise(widths))
        )
        self.middle = pair(channels[-1], channels[-1], nn.Identity())
        self.up = nn.ModuleList(
            pair(2 * b, a, _double(a)) for a, b in reversed(list(pairwise(channels)))
        )
        self.head = _ConvBlock(channels[0], channels[0], kernel_size, _LAST_GROUPS)
        self.last = skip_init(nn.Conv1d, channels[0], action_dim, 1)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew and zero the biases; the output gain applies again."""
        initialise(self, self.init, generator)
        self.last.weight.mul_(self.output_gain)

    def forward(self, observation: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Evaluate at ``x`` ``[..., H * A]``, ``time`` ``[..., 1]``; leading dims broadcast."""
        parts = zip(self._time_parts(time), self._observation_parts(observation), strict=True)
        return self._run(x, [a + b for a, b in parts])

    def on_grid(self, observation: Tensor, times: Tensor) -> Field:
        """See :class:`~genpol.policies.denoiser.DenoisingNetwork`."""
        own = self._observation_parts(observation)
        steps = [part.unbind(0) for part in self._time_parts(times)]

        def output(x: Tensor, step: int) -> Tensor:
            return self._run(x, [a[step] + b for a, b in zip(steps, own, strict=True)])

        return output

    def _films(self) -> Iterator[nn.Linear]:
        """Yield what makes the modulation of every block, in the order of their use."""
        for pair in (*self.down, self.middle, *self.up):
            for block in _parts(pair)[:2]:
                assert isinstance(block, _ResidualBlock)
                yield block.film

    def _time_parts(self, time: Tensor) -> list[Tensor]:
        """Return the share of times ``[..., 1]`` in every block's modulation, bias included."""
        seen = F.mish(self.embedding(time))
        return [F.linear(seen, x.weight[:, : self._time_dim], x.bias) for x in self._films()]

    def _observation_parts(self, observation: Tensor) -> list[Tensor]:
        seen = F.mish(observation)
        return [F.linear(seen, x.weight[:, self._time_dim :]) for x in self._films()]

    def _run(self, x: Tensor, films: Sequence[Tensor]) -> Tensor:
        """Return the output at ``x`` ``[..., H * A]`` for modulations ``[..., c]`` by block."""
        leading = torch.broadcast_shapes(x.shape[:-1], films[0].shape[:-1])
        rows = x.expand(*leading, -1).reshape(-1, *self._chunk).roll(self.past_steps, 1)
        signal = rows.transpose(1, 2)
        queue = iter([film.expand(*leading, -1).reshape(len(rows), -1) for film in films])
        skips = []
        for first, second, halve in map(_parts, self.down):
            signal = second(first(signal, next(queue)), next(queue))
            skips.append(signal)
            signal = halve(signal)
        first, second, _ = _parts(self.middle)
        signal = second(first(signal, next(queue)), next(queue))
        for first, second, double in map(_parts, self.up):
            signal = torch.cat((signal, skips.pop()), dim=1)
            signal = double(second(first(signal, next(queue)), next(queue)))
        out = self.last(self.head(signal)).transpose(1, 2).roll(-self.past_steps, 1)
        return out.reshape(*leading, -1)


class _ConvBlock(nn.Module):
    """Convolution of the same length, group norm and Mish."""

    def __init__(self, fan_in: int, fan_out: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.conv = skip_init(nn.Conv1d, fan_in, fan_out, kernel_size, padding=kernel_size // 2)
        self.norm = nn.GroupNorm(groups, fan_out)

    def forward(self, x: Tensor) -> Tensor:
        return F.mish(self.norm(self.conv(x)))


class _ResidualBlock(nn.Module):
    """Two convolutions with a shortcut, modulated in between."""

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        condition: int,
        *,
        kernel_size: int,
        groups: int,
        scale: bool,
    ) -> None:
        super().__init__()
        self.first = _ConvBlock(fan_in, fan_out, kernel_size, groups)
        self.second = _ConvBlock(fan_out, fan_out, kernel_size, groups)
        self.film = skip_init(nn.Linear, condition, fan_out * (2 if scale else 1))
        alike = fan_in == fan_out
        self.shortcut = nn.Identity() if alike else skip_init(nn.Conv1d, fan_in, fan_out, 1)
        self._scale = scale

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        hidden, film = self.first(x), film.unsqueeze(-1)
        if self._scale:
            scale, shift = film.chunk(2, dim=1)
            hidden = scale * hidden + shift
        else:
            hidden = hidden + film
        out: Tensor = self.second(hidden) + self.shortcut(x)
        return out


def _parts(pair: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Return the two blocks of a length, and what leads to the next."""
    first, second, then = cast(nn.ModuleList, pair)
    return first, second, then


def _halve(channels: int) -> nn.Module:
    return skip_init(nn.Conv1d, channels, channels, 3, stride=2, padding=1)


def _double(channels: int) -> nn.Module:
    return skip_init(nn.ConvTranspose1d, channels, channels, 4, stride=2, padding=1)


def _check(
    horizon: int, channels: Sequence[int], kernel_size: int, groups: int, past_steps: int
) -> None:
    if not channels or any(x % groups for x in channels):
        raise ConfigError(
            f"actor.hidden = {list(channels)}: channels of a unet must be divisible by "
            f"unet.groups = {groups}"
        )
    if channels[0] % _LAST_GROUPS:
        raise ConfigError(
            f"actor.hidden = {list(channels)}: the first channels of a unet must be divisible by "
            f"{_LAST_GROUPS}"
        )
    shortest = 2 ** (len(channels) - 1)
    if horizon % shortest:
        raise ConfigError(
            f"agent.horizon = {horizon}: a unet of {len(channels)} lengths needs a multiple of "
            f"{shortest}; change it, or the number of channels in actor.hidden"
        )
    if kernel_size % 2 == 0:
        raise ConfigError(f"unet.kernel_size = {kernel_size}: must be odd")
    if not 0 <= past_steps < horizon:
        raise ConfigError(f"unet.past_steps = {past_steps}: must lie in [0, {horizon - 1}]")
