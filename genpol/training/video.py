"""Videos of episodes, written whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import tempfile
from collections.abc import Iterable
from fractions import Fraction
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
        staged.touch()  # here Python says why it cannot; ffmpeg's own words are many
        _encode(staged, frames, fps)
        staged.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise GenpolError(
            f"{path}: the video cannot be written ({reason}); choose a file in a folder that is "
            "writable and has space"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            staged.unlink()


def _encode(path: Path, frames: Iterable[NDArray[np.uint8]], fps: float) -> None:
    """Pipe the frames through ffmpeg."""
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise GenpolError("no frames to make a video of; render at least one step")
    command = _command(_check(first, first.shape), fps, path)
    with tempfile.TemporaryFile() as log:
        try:
            with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log) as ffmpeg:
                assert ffmpeg.stdin is not None
                for frame in itertools.chain([first], iterator):
                    _check(frame, first.shape)
                    ffmpeg.stdin.write(np.ascontiguousarray(frame).data)
        except BrokenPipeError:
            if ffmpeg.returncode == 0:  # the frames' own pipe broke
                raise
        if ffmpeg.returncode != 0:
            log.seek(0)
            said = log.read().decode(errors="replace").split("\n")[0]
            raise OSError(f"ffmpeg ended with {ffmpeg.returncode}: {said or 'no reason given'}")


def _command(shape: tuple[int, ...], fps: float, path: Path) -> list[str]:
    """Return the call of ffmpeg that encodes raw RGB frames from its standard input."""
    import imageio_ffmpeg

    try:
        program = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise GenpolError(
            "no ffmpeg to write videos with; run: pip install imageio-ffmpeg, or install ffmpeg"
        ) from None
    size = f"{shape[1]}x{shape[0]}"
    rate = str(Fraction(fps).limit_denominator())
    return [
        *(program, "-y", "-loglevel", "error"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", rate, "-i", "-"),
        *("-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-vcodec", "libx264", "-pix_fmt", "yuv420p"),
        *("-f", "mp4", str(path)),
    ]


def _check(frame: NDArray[np.uint8], shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a frame, which must be an RGB image like the first."""
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or frame.shape != shape:
        raise ValueError(
            f"frame is {frame.dtype} {list(frame.shape)}: must be uint8 [H, W, 3], all of one size"
        )
    return frame.shape
