"""Videos of episodes, written whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from genpol.errors import GenpolError


def write_mp4(path: Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> None:
    """Encode frames as H.264, which every browser plays.

    Frames are encoded as they come, so a generator of a long episode needs little memory. An odd
    width or height, which the codec cannot hold, gets one black line more.

    Args:
        path: The file to write or replace; parents are made.
        frames: RGB images ``[H, W, 3]``, uint8, all of one size.
        fps: Frames per second.

    Raises:
        GenpolError: If there are no frames, ffmpeg is missing or fails, or the file cannot be
            written. An earlier file at ``path`` is then as it was.
    """
    staged = path.with_name(f".tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _encode(staged, frames, fps)
        staged.replace(path)
    except OSError as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise GenpolError(f"{path}: the video cannot be written ({reason})") from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()


def _encode(path: Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> None:
    """Pipe the frames through ffmpeg."""
    import imageio_ffmpeg

    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise GenpolError("no frames to make a video of; render at least one step")
    height, width = _check(first, first.shape)[:2]
    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise GenpolError(
            "no ffmpeg to write videos with; run: pip install imageio-ffmpeg, or install ffmpeg"
        ) from None
    writer = imageio_ffmpeg.write_frames(
        path,
        (width, height),
        fps=fps,
        macro_block_size=1,
        ffmpeg_log_level="error",
        output_params=["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2"],
    )
    try:
        writer.send(None)  # starts ffmpeg
        writer.send(np.ascontiguousarray(first))
        for frame in iterator:
            _check(frame, first.shape)
            writer.send(np.ascontiguousarray(frame))
    finally:
        writer.close()
    if not path.is_file() or path.stat().st_size == 0:
        raise OSError("ffmpeg failed and said why above")


def _check(frame: NDArray[np.uint8], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a frame, which must be an RGB image like the first."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.shape != shape:
        raise ValueError(
            f"frame is {frame.dtype} {list(frame.shape)}: must be uint8 [H, W, 3], all of one size"
        )
    return frame.shape
