"""`genpol data record` on a tiny run: what it refuses, what it makes, how it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import weakref
from pathlib import Path

import h5py
import numpy as np
import pytest

from genpol.cli import data_record
from genpol.cli.main import main
from genpol.data.dataset import OfflineDataset
from genpol.data.formats import open_dataset
from genpol.data.store import DatasetWriter
from genpol.errors import DatasetError, MissingExtraError
from genpol.training import checkpoint

HELD = 5  # control steps for which the run holds an action
LENGTH = 50 // HELD  # actions of an episode of Reacher-v5
EPISODES = 6  # a round of four, and one of two


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train for two hundred steps; the folder has two checkpoints."""
    output = tmp_path_factory.mktemp("runs")
    arguments = ["env=Reacher-v5", "agent=ppo", "num_envs=4", "num_threads=1", "env.num_threads=1"]
    arguments += ["agent.rollout_steps=5", "agent.minibatches=2", "total_steps=200"]
    arguments += [f"env.action_repeat={HELD}"]
    arguments += ["checkpoint.interval_steps=100", "evaluation.episodes=2", "tensorboard=false"]
    assert main(["train", *arguments, "video=false", f"output={output}"]) == 0
    return next(output.glob("Reacher-v5/ppo/*"))


@pytest.fixture(scope="module")
def whole(run: Path, tmp_path_factory: pytest.TempPathFactory) -> OfflineDataset:
    """Record without a stop."""
    target = tmp_path_factory.mktemp("whole") / "data"
    assert record(run, target, "format=genpol") == 0
    return open_dataset(target)


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GENPOL_CACHE", str(tmp_path / "cache"))


def record(run: Path, target: Path, *options: str) -> int:
    return main(["data", "record", str(run), f"output={target}", f"episodes={EPISODES}", *options])


def checkpoints(run: Path) -> list[Path]:
    return [run / "checkpoints" / checkpoint.step_name(steps) for steps in (100, 200)]


def staging(target: Path) -> Path:
    return target.with_name(f".tmp-{target.name}")


def assert_equal(found: OfflineDataset, expected: OfflineDataset) -> None:
    assert found.ends.tolist() == expected.ends.tolist()
    assert found.columns.keys() == expected.columns.keys()
    for name, column in expected.columns.items():
        assert np.array_equal(found.columns[name], column), name


@pytest.fixture
def no_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail as soon as an episode runs."""

    def run_episodes(*args: object, **options: object) -> None:
        raise AssertionError("an episode runs")

    monkeypatch.setattr("genpol.training.evaluation.trajectories", run_episodes)


def stop_after(episodes: int, monkeypatch: pytest.MonkeyPatch, how: signal.Signals | Exception):
    """Send a signal, or raise, when so many episodes are kept."""
    append = DatasetWriter.append_trajectory

    def interrupted(self: DatasetWriter, *args: object, **options: object) -> None:
        if isinstance(how, Exception) and self.num_trajectories == episodes:
            raise how
        append(self, *args, **options)
        if isinstance(how, signal.Signals) and self.num_trajectories == episodes:
            os.kill(os.getpid(), how)

    monkeypatch.setattr(DatasetWriter, "append_trajectory", interrupted)


# --- what is made ------------------------------------------------------------------------------


def test_episodes_are_whole_and_start_apart(whole: OfflineDataset) -> None:
    assert (whole.ends - whole.starts).tolist() == [LENGTH] * EPISODES
    assert {"observation", "action", "reward", "terminated"} <= whole.columns.keys()
    assert len(np.unique(whole.columns["observation"][whole.starts], axis=0)) == EPISODES
    whole.validate()


@pytest.mark.parametrize(("name", "target"), [("minari", "data-v0"), ("ogbench", "data.npz")])
def test_every_format_holds_the_same(
    run: Path,
    whole: OfflineDataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    target: str,
) -> None:
    path = tmp_path / target
    assert record(run, path, *([] if name == "minari" else [f"format={name}"])) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{path}: 6 episodes, 60 transitions"
    assert_equal(open_dataset(path), whole)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name != "cache"] == [target]
    assert main(["data", "info", str(path), "json=true"]) == 0
    metadata = json.loads(capsys.readouterr().out)["metadata"]
    assert (metadata["env"], metadata["action_repeat"]) == ("Reacher-v5", HELD)
    assert metadata["checkpoints"] == [str(checkpoints(run)[1])]


def test_the_id_for_minari_is_not_that_of_the_staging_folder(run: Path, tmp_path: Path) -> None:
    assert record(run, tmp_path / "data-v0") == 0
    description = json.loads((tmp_path / "data-v0/data/metadata.json").read_text())
    assert description["dataset_id"] == "data-v0"
    assert (description["total_episodes"], description["total_steps"]) == (EPISODES, 60)


def test_runs_are_mixed_one_after_the_other(
    run: Path, whole: OfflineDataset, tmp_path: Path
) -> None:
    early, late = checkpoints(run)
    target = tmp_path / "mix"
    assert record(late, target, str(early), "format=genpol") == 0
    mixed = open_dataset(target)
    assert mixed.num_trajectories == 2 * EPISODES
    half = len(whole.columns["observation"])
    assert np.array_equal(mixed.columns["observation"][:half], whole.columns["observation"])
    first = mixed.columns["observation"][mixed.starts]
    assert len(np.unique(first, axis=0)) == 2 * EPISODES  # the second has starts of its own
    assert mixed.metadata["checkpoints"] == [str(late), str(early)]


def test_the_policys_mode_is_another_recording(
    run: Path, whole: OfflineDataset, tmp_path: Path
) -> None:
    assert record(run, tmp_path / "mode", "format=genpol", "stochastic=false") == 0
    mode = open_dataset(tmp_path / "mode")
    starts = (mode.columns["observation"], whole.columns["observation"])
    assert np.array_equal(starts[0][mode.starts], starts[1][whole.starts])
    assert not np.array_equal(mode.columns["action"], whole.columns["action"])


def test_held_actions_are_noted_and_shown(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "held"
    assert record(run, target, "format=genpol", "env.action_repeat=25") == 0
    assert open_dataset(target).num_transitions == EPISODES * 2
    capsys.readouterr()
    assert main(["data", "info", str(target)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "action repeat 25" in lines


def test_episodes_do_not_pile_up_in_memory(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = DatasetWriter.append_trajectory
    written: list[weakref.ref[np.ndarray]] = []
    alive = []

    def append_and_count(self: DatasetWriter, columns: dict[str, np.ndarray]) -> None:
        append(self, columns)
        alive.append(sum(reference() is not None for reference in written))
        written.append(weakref.ref(columns["observation"]))

    monkeypatch.setattr(DatasetWriter, "append_trajectory", append_and_count)
    assert record(run, tmp_path / "data", "format=genpol", "num_envs=1") == 0
    assert len(alive) == EPISODES
    assert max(alive) <= 1  # the one before, until its name is taken


def test_the_environment_may_be_named(run: Path, tmp_path: Path) -> None:
    assert record(run, tmp_path / "x", "format=genpol", "env=Reacher-v5") == 0


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_episode")
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["RUN"], "no output given: add output="),
        (["output=x"], "no run given; write: genpol data record RUN"),
        (["RUN", "output=x"], "x: Minari's names are letters, digits, _ and -, and end in a ver"),
        (["RUN", "output=x", "format=ogbench"], "x: must end in .npz"),
        (["RUN", "output=x", "format=d4rl"], "format = 'd4rl': is only read, not written"),
        (["RUN", "output=.", "format=genpol"], ".: exists; nothing is overwritten"),
        (["RUN", "output=x-v0", "episodes=0"], "episodes = 0: must be >= 1"),
        (["RUN", "output=x-v0", "episodes=few"], "episodes = 'few': must be an integer"),
        (["RUN", "output=x-v0", "seed=-1"], "seed = -1: must be >= 0"),
        (["RUN", "output=x-v0", "seed=1", "seed=2"], "seed is given twice"),
        (["RUN", "output=x-v0", "stochastic=no"], "stochastic = 'no': must be true or false"),
        (["RUN", "output=x-v0", "episode=3"], "unknown option 'episode'"),
        (["RUN", "output=x-v0", "env=HopperStand"], "env = 'HopperStand': "),
        (["RUN", "output=x-v0", "env.name=HopperStand"], "a run keeps the environment it has"),
        (["nowhere", "output=x-v0"], "nowhere: no such folder"),
    ],
)
def test_wrong_requests_are_refused_before_an_episode_runs(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [str(run) if word == "RUN" else word for word in arguments]
    assert main(["data", "record", *words]) in (1, 2)
    captured = capsys.readouterr()
    assert expected in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_episode")
def test_a_missing_package_is_told_before_an_episode_runs(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(module: str, extra: str) -> None:
        raise MissingExtraError(f"package {module!r} is not installed")

    monkeypatch.setattr("genpol.data.formats.minari.require", missing)
    with pytest.raises(MissingExtraError, match="'h5py' is not installed"):
        data_record.run([str(run), f"output={tmp_path / 'x-v0'}"])


@pytest.mark.usefixtures("no_episode")
def test_runs_of_different_environments_are_recorded_apart(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from genpol.cli import runs

    load = runs.load_run

    def load_run(path: Path, overrides: object) -> runs.TrainedRun:
        trained = load(path)
        if path.name == checkpoint.step_name(100):
            env = replace(trained.settings.env, name="Pusher-v5")
            return replace(trained, settings=replace(trained.settings, env=env))
        return trained

    monkeypatch.setattr(runs, "load_run", load_run)
    early, late = checkpoints(run)
    assert main(["data", "record", str(late), str(early), f"output={tmp_path / 'x-v0'}"]) == 2
    assert (
        f"{early}: acts in Pusher-v5 with action_repeat=5, {late} in Reacher-v5 with "
        "action_repeat=5; record them apart"
    ) in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- interruptions -----------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_episodes_and_the_same_command_goes_on(
    run: Path,
    whole: OfflineDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    target = tmp_path / "data-v0"
    with monkeypatch.context() as patched:
        stop_after(4, patched, number)
        assert record(run, target) == code
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"stopped by {number.name} after 4 of 6 episodes, which {staging(target)} keeps; the same "
        "command goes on"
    )
    assert not target.exists()
    assert record(run, target) == 0
    assert "going on after 4 of 6 episodes\n" in capsys.readouterr().out
    assert_equal(open_dataset(target), whole)
    assert not staging(target).exists()


@pytest.mark.parametrize("kept", [0, 1, 5])
def test_a_failure_within_a_round_loses_nothing_and_doubles_nothing(
    run: Path,
    whole: OfflineDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kept: int,
) -> None:
    target = tmp_path / "data"
    with monkeypatch.context() as patched:
        stop_after(kept, patched, DatasetError("the disk is full; free some space"))
        assert record(run, target, "format=genpol") == 1
    note = f"; {kept} of 6 episodes are kept, and the same command goes on" if kept else ""
    error = f"genpol: error: the disk is full; free some space{note}\n"
    assert capsys.readouterr().err == error
    assert record(run, target, "format=genpol") == 0
    assert_equal(open_dataset(target), whole)


def test_a_failure_within_the_second_run_is_resumed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = checkpoints(run)
    options = (str(late), "format=genpol")
    assert record(early, tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patched:
        stop_after(EPISODES + 1, patched, DatasetError("cut"))
        assert record(early, tmp_path / "cut", *options) == 1
    assert record(early, tmp_path / "cut", *options) == 0
    assert_equal(open_dataset(tmp_path / "cut"), open_dataset(tmp_path / "whole"))


def test_a_stop_before_the_first_episode_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from genpol.training import evaluation

    arrays = evaluation._arrays

    def interrupted(tensordict: object) -> object:
        os.kill(os.getpid(), signal.SIGINT)
        return arrays(tensordict)

    monkeypatch.setattr(evaluation, "_arrays", interrupted)
    assert record(run, tmp_path / "data", "format=genpol") == 130
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "stopped by SIGINT before the first of 6 episodes was finished"
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_conversion_goes_on_without_an_episode(
    run: Path,
    whole: OfflineDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "data-v0"

    def ctrl_c(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("genpol.data.formats.minari._write_episode", ctrl_c)
        assert record(run, target) == 130
    assert "after 6 of 6 episodes" in capsys.readouterr().out
    assert sorted(entry.name for entry in staging(target).iterdir()) == ["episodes", "recipe.json"]
    with monkeypatch.context() as patched:
        patched.setattr("genpol.training.evaluation.trajectories", None)
        assert record(run, target) == 0
    with h5py.File(target / "data/main_data.hdf5") as file:
        assert len(file) == EPISODES
    assert_equal(open_dataset(target), whole)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("seed=1", "seed 30000 and not 1"),
        ("episodes=5", "episodes 6 and not 5"),
        ("stochastic=false", "stochastic True and not False"),
        ("env.action_repeat=1", "overrides [] and not ['env.action_repeat=1']"),
        ("RUN", "checkpoints ["),
    ],
)
def test_another_command_leaves_an_interrupted_recording_alone(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    expected: str,
) -> None:
    target = tmp_path / "data"
    options = {"episodes": f"episodes={EPISODES}", "format": "format=genpol"}
    command = ["data", "record", f"output={target}"]
    with monkeypatch.context() as patched:
        stop_after(1, patched, DatasetError("cut"))
        assert main([*command, str(run), *options.values()]) == 1
    before = sorted(str(path) for path in staging(target).rglob("*"))
    capsys.readouterr()
    source = str(checkpoints(run)[0]) if change == "RUN" else str(run)
    if change != "RUN":
        options[change.partition("=")[0]] = change
    assert main([*command, source, *options.values()]) == 2
    error = capsys.readouterr().err
    assert f"{staging(target)}: holds what an interrupted command made of " in error
    assert expected in error
    assert error.count("\n") == 1
    assert sorted(str(path) for path in staging(target).rglob("*")) == before


# --- what a recording is for -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("repeat", [1, 5])
def test_an_agent_learns_from_a_recording(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], repeat: int
) -> None:
    data = tmp_path / "data-v0"
    assert record(run, data, f"env.action_repeat={repeat}") == 0
    arguments = ["env=Reacher-v5", "agent=fql", f"data={data}", "total_steps=20", "num_envs=2"]
    arguments += ["num_threads=1", "env.num_threads=1", "agent.batch_size=16"]
    arguments += ["evaluation.episodes=2", "tensorboard=false", "video=false"]
    capsys.readouterr()
    assert main(["train", *arguments, f"output={tmp_path / 'runs'}"]) == 0
    out, error = capsys.readouterr()
    assert "evaluate with: genpol eval" in out
    warning = (
        f"warning: {data}: its actions are held for 5 steps, those of the environment for 1; set "
        "env.action_repeat=5\n"
    )
    assert (warning in error) == (repeat == 5)
