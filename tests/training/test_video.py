"""Videos are written whole or not at all."""

from __future__ import annotations

import imageio_ffmpeg
import numpy as np
import pytest

from genpol.errors import GenpolError
from genpol.training.video import write_mp4


def frames(count=4, height=32, width=48):
    return [np.full((height, width, 3), 60 * i, dtype=np.uint8) for i in range(count)]


def facts(path):
    """Return width, height, frames per second and brightness by frame."""
    reader = imageio_ffmpeg.read_frames(path)
    meta = next(reader)
    return *meta["size"], meta["fps"], [np.frombuffer(image, np.uint8).mean() for image in reader]


def test_frames_come_back_in_order_and_size(tmp_path):
    write_mp4(tmp_path / "videos" / "final.mp4", iter(frames()), fps=25)
    width, height, fps, brightness = facts(tmp_path / "videos" / "final.mp4")
    assert (width, height, fps) == (48, 32, 25)
    assert brightness == pytest.approx([0, 60, 120, 180], abs=4)


def test_an_odd_size_gets_one_line_more(tmp_path):
    write_mp4(tmp_path / "a.mp4", frames(height=33, width=47), fps=10)
    assert facts(tmp_path / "a.mp4")[:2] == (48, 34)


def broken():
    yield from frames(2)
    raise RuntimeError("the renderer died")


def test_frames_that_end_in_an_error_leave_the_old_video(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="renderer"):
        write_mp4(path, broken(), fps=10)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "bad",
    [np.zeros((8, 8, 3), np.float32), np.zeros((8, 8), np.uint8), np.zeros((9, 8, 3), np.uint8)],
    ids=["float", "grey", "other size"],
)
def test_a_frame_unlike_the_first_is_refused(tmp_path, bad):
    with pytest.raises(ValueError, match="must be uint8"):
        write_mp4(tmp_path / "a.mp4", [np.zeros((8, 8, 3), np.uint8), bad], fps=10)
    assert list(tmp_path.iterdir()) == []


def test_no_frames_are_an_error(tmp_path):
    with pytest.raises(GenpolError, match="no frames"):
        write_mp4(tmp_path / "a.mp4", [], fps=10)


def test_without_ffmpeg_it_says_what_to_install(tmp_path, monkeypatch):
    def absent():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", absent)
    with pytest.raises(GenpolError, match="pip install imageio-ffmpeg"):
        write_mp4(tmp_path / "a.mp4", frames(), fps=10)


def test_an_unwritable_place_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(GenpolError, match="the video cannot be written") as caught:
        write_mp4(tmp_path / "file" / "a.mp4", frames(), fps=10)
    assert "\n" not in str(caught.value)


def test_what_ffmpeg_says_is_told_in_one_line(tmp_path, monkeypatch, capfd):
    failing = tmp_path / "ffmpeg"
    failing.write_text(
        "#!/bin/sh\necho 'No space left on device\nConversion failed!' >&2\nexit 1\n"
    )
    failing.chmod(0o755)
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(failing))
    with pytest.raises(
        GenpolError, match=r"ffmpeg ended with 1: No space left on device\)"
    ) as caught:
        write_mp4(tmp_path / "a.mp4", frames(height=512, width=512), fps=10)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [failing]
