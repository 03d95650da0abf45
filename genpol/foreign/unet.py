"""The conditional U-Net as the code of Diffusion Policy, robomimic and LeRobot name its parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from genpol.errors import CheckpointError

_NAMES = (
    (r"^diffusion_step_encoder\.1\.", "embedding.first."),
    (r"^diffusion_step_encoder\.3\.", "embedding.last."),
    (r"^down_modules\.", "down."),
    (r"^mid_modules\.", "middle."),
    (r"^up_modules\.", "up."),
    (r"^final_conv\.0\.block\.", "head."),
    (r"^final_conv\.1\.", "last."),
    (r"\.(?:blocks\.0|conv1)\.block\.", ".first."),
    (r"\.(?:blocks\.1|conv2)\.block\.", ".second."),
    (r"\.cond_encoder\.1\.", ".film."),
    (r"\.residual_conv\.", ".shortcut."),
    (r"\.2\.conv\.", ".2."),
    (r"(first|second|head)\.0\.", r"\1.conv."),
    (r"(first|second|head)\.1\.", r"\1.norm."),
)


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights under the names of :class:`~genpol.policies.unet.ConditionalUnet1D`."""
    found = {}
    for name, x in weights.items():
        for pattern, own in _NAMES:
            name = re.sub(pattern, own, name)
        found[name] = x
    return found


@dataclass(frozen=True)
class Sizes:
    """What the shapes of the weights say.

    Attributes:
        channels: At each length, the full one first.
        kernel_size: Of the convolutions.
        time_dim: Width of the embedded time.
        scale: Whether channels are scaled as well as shifted.
        condition_dim: Width of the observations that it sees at once.
        action_dim: Width of an action.
    """

    channels: list[int]
    kernel_size: int
    time_dim: int
    scale: bool
    condition_dim: int
    action_dim: int


def sizes_of(weights: Mapping[str, Tensor], where: str) -> Sizes:
    """Read the sizes off renamed weights.

    Raises:
        CheckpointError: If they are not those of such a network.
    """
    channels: list[int] = []
    try:
        while f"down.{len(channels)}.0.first.conv.weight" in weights:
            first = weights[f"down.{len(channels)}.0.first.conv.weight"]
            channels.append(first.shape[0])
        film = weights["down.0.0.film.weight"]
        time_dim = weights["embedding.first.weight"].shape[1]
        return Sizes(
            channels=channels,
            kernel_size=weights["down.0.0.first.conv.weight"].shape[2],
            time_dim=time_dim,
            scale=film.shape[0] == 2 * channels[0],
            condition_dim=film.shape[1] - time_dim,
            action_dim=weights["last.weight"].shape[0],
        )
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{where}: is not the conditional U-Net of Diffusion Policy (it has no {error})"
        ) from None
