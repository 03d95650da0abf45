"""What a training leaves to look at: a video of the final policy and TensorBoard's curves."""

from __future__ import annotations

import csv
from pathlib import Path

import imageio.v3 as imageio
import numpy as np
import pytest

from genpol.cli.main import main

# Five control steps an action: ten frames an episode, which software draws in half a second.
# Training episodes of two actions, so that some end within the two updates.
TINY = [
    *("env=Reacher-v5", "env.action_repeat=5", "env.train_episode_steps=10"),
    *("env.num_threads=1", "num_threads=1", "num_envs=4", "total_steps=160"),
    *("agent=ppo", "agent.rollout_steps=4", "agent.minibatches=2", "evaluation.episodes=2"),
    *("tensorboard=true", "video=true"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for two updates and return the run folder."""
    output = tmp_path_factory.mktemp("runs")
    assert main(["train", *TINY, f"output={output}"]) == 0
    (folder,) = output.glob("Reacher-v5/ppo/*")
    return folder


@pytest.fixture(scope="module")
def video(run: Path, opengl: None) -> Path:
    return run / "videos" / "final.mp4"


def test_the_video_shows_the_scene(video: Path) -> None:
    frame = imageio.imread(video, index=0, plugin="FFMPEG")
    assert frame.shape == (360, 480, 3)
    assert frame.mean() > 20
    assert frame.std() > 10  # black, white or grey all over would be no picture


def test_the_video_is_one_episode_in_real_time(video: Path) -> None:
    facts = imageio.immeta(video, plugin="FFMPEG")
    assert facts["fps"] == pytest.approx(10)  # five control steps of 20 ms
    assert facts["duration"] == pytest.approx(1)


def test_the_video_moves(video: Path) -> None:
    first, *_, last = imageio.imiter(video, plugin="FFMPEG")
    assert (np.abs(first.astype(int) - last.astype(int)).max(-1) > 50).sum() > 20


@pytest.mark.parametrize(
    ("table", "column", "tag"),
    [
        ("evals.csv", "return_mean", "evaluation/return_mean"),
        ("metrics.csv", "train/return", "train/return"),
    ],
)
def test_tensorboard_holds_the_returns_of_the_tables(
    run: Path, table: str, column: str, tag: str
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with (run / table).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[column]]
    expected = [(int(row["env_steps"]), float(row[column])) for row in rows]
    events = EventAccumulator(str(run / "tensorboard")).Reload().Scalars(tag)
    assert len(expected) >= 2
    assert [event.step for event in events] == [step for step, _ in expected]
    assert [event.value for event in events] == pytest.approx([value for _, value in expected])
