"""Data of OGBench's environments: made here, read by OGBench, and labelled as it labels them."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from genpol.envs.settings import OGBENCH_NAMES, OGBenchSettings
from genpol.errors import ConfigError, DatasetError, EnvironmentFault

ogbench = pytest.importorskip("ogbench", reason="needs the extra genpol[ogbench]")

from genpol.data.dataset import OfflineDataset  # noqa: E402
from genpol.data.formats import open_dataset  # noqa: E402
from genpol.envs import generation as generating  # noqa: E402
from genpol.envs.generation import Generation, Plan, write_npz  # noqa: E402
from genpol.envs.ogbench_data import Demonstrator, Recipe  # noqa: E402

Episode = dict[str, np.ndarray]
RECIPE = Recipe(name="scene", seed=3, episode_rows=31)
PLAN = Plan(RECIPE, {"train": 3, "val": 1})


@pytest.fixture(scope="module")
def demonstrator() -> Demonstrator:
    return Demonstrator(RECIPE)


@pytest.fixture(scope="module")
def episodes(demonstrator: Demonstrator) -> dict[str, Episode]:
    """Return the episodes of the plan by file name, made in this process in reverse order."""
    backwards = reversed(list(PLAN.files()))
    return {name: demonstrator.episode(split, index) for split, index, name in backwards}


def assert_same(a: Episode, b: Episode) -> None:
    assert sorted(a) == sorted(b)
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key])


@pytest.fixture
def finished(episodes: dict[str, Episode], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a data set put together from episodes that lie in the staging folder already."""
    output = tmp_path / "scene-play-v0.npz"
    generation = Generation(PLAN, output)
    for name, episode in episodes.items():
        generating._save(generation.folder / name, episode)
    assert generation.run(1)
    generation.finish()
    return output


def test_rows_are_states_as_ogbench_stores_them(demonstrator: Demonstrator) -> None:
    rows = demonstrator.episode("train", 0)
    types = {key: str(values.dtype) for key, values in rows.items()}
    assert types == {
        **dict.fromkeys(("observations", "actions", "qpos", "qvel"), "float32"),
        "terminals": "bool",
        "button_states": "int64",
    }
    assert {len(values) for values in rows.values()} == {31}
    assert rows["terminals"].tolist() == [False] * 30 + [True]
    assert np.abs(rows["actions"]).max() <= 1
    # The arm's joints lead both the observation and the simulator's state.
    np.testing.assert_array_equal(rows["observations"][:, :6], rows["qpos"][:, :6])
    shown = rows["observations"][:, 28:36].reshape(-1, 2, 4)[:, :, :2].argmax(-1)
    np.testing.assert_array_equal(shown, rows["button_states"])


def test_episodes_differ_between_numbers_splits_and_seeds(
    demonstrator: Demonstrator, episodes: dict[str, Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = {name: tuple(episode["qpos"][0]) for name, episode in episodes.items()}
    monkeypatch.setattr(demonstrator, "recipe", Recipe(name="scene", seed=4, episode_rows=2))
    starts["another seed"] = tuple(demonstrator.episode("train", 0)["qpos"][0])
    assert len(set(starts.values())) == 5


def test_noise_is_more_than_that_of_plans() -> None:
    noisy = Demonstrator(Recipe(name="puzzle-3x3", kind="noisy", episode_rows=61))
    play = Demonstrator(Recipe(name="puzzle-3x3", episode_rows=61))
    changes = [
        np.abs(np.diff(made.episode("train", 0)["actions"][:-1, :3], axis=0)).mean()
        for made in (noisy, play)
    ]
    assert changes[0] > 2 * changes[1]


def test_global_random_state_stays(demonstrator: Demonstrator) -> None:
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    demonstrator.episode("train", 0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_unsound_episodes_are_played_anew(
    demonstrator: Demonstrator, episodes: dict[str, Episode], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for _ in range(2):
        answers = iter([False, True])
        monkeypatch.setattr(demonstrator, "_is_sound", lambda rows, answers=answers: next(answers))
        found.append(demonstrator.episode("train", 0))
    assert_same(*found)
    assert (found[0]["qpos"][0] != episodes["train-0000000.npz"]["qpos"][0]).any()


@pytest.mark.parametrize(
    ("y", "z", "sound"),
    [
        (0.0, 0.02, True),
        (0.289, 0.02, True),
        (0.291, 0.02, False),
        (-0.36, 0.07, True),  # in the drawer
        (-0.36, 0.02, False),
        (-0.36, 0.09, False),
    ],
)
def test_cubes_out_of_view_are_unsound(
    demonstrator: Demonstrator, y: float, z: float, sound: bool
) -> None:
    rows = {"qpos": np.zeros((31, 25)), "time": 0.05 * np.arange(1, 32)[:, None]}
    rows["qpos"][7, 15:17] = y, z
    assert demonstrator._is_sound(rows) is sound


def test_a_clock_that_goes_back_is_unsound(demonstrator: Demonstrator) -> None:
    rows = {"qpos": np.zeros((31, 25)), "time": 0.05 * np.arange(1, 32)[:, None]}
    rows["time"][20:] -= rows["time"][20] - 0.01  # MuJoCo starts a simulation that diverges anew
    assert not demonstrator._is_sound(rows)


@pytest.mark.parametrize(
    ("num_transitions", "episodes"),
    [(1, (1, 1)), (1000, (1, 1)), (1001, (2, 1)), (1_000_000, (1000, 100))],
)
def test_sizes_are_whole_episodes_and_a_tenth(
    num_transitions: int, episodes: tuple[int, int]
) -> None:
    recipe = Recipe(name="cube-single")
    plan = Plan.of_size(recipe, recipe.episodes(num_transitions))
    assert (plan.episodes["train"], plan.episodes["val"]) == episodes
    assert plan.num_episodes == len(list(plan.files())) == sum(episodes)


def test_result_is_all_episodes_in_order(finished: Path, episodes: dict[str, Episode]) -> None:
    with np.load(finished) as arrays:
        for key in arrays.files:
            parts = [episodes[f"train-{index:07d}.npz"][key] for index in range(3)]
            np.testing.assert_array_equal(arrays[key], np.concatenate(parts))
    with np.load(finished.with_name("scene-play-v0-val.npz")) as arrays:
        assert_same(dict(arrays), episodes["val-0000000.npz"])
    assert sorted(path.name for path in finished.parent.iterdir()) == [
        "scene-play-v0-val.npz",
        "scene-play-v0.npz",
    ]


def test_result_says_how_it_came_about(finished: Path) -> None:
    with zipfile.ZipFile(finished) as archive:
        found = json.loads(archive.comment)
    assert (found["env"], found["kind"], found["seed"], found["split"]) == (
        *("scene", "play"),
        *(3, "train"),
    )
    assert found["versions"]["ogbench"] == "1.2.2"


@pytest.mark.parametrize("name", ["scene-play-v0.npz", "scene-play-v0-val.npz"])
def test_nothing_is_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises((ConfigError, DatasetError), match=f"{name}.*nothing is overwritten"):
        Generation(PLAN, tmp_path / "scene-play-v0.npz")
    assert (tmp_path / name).read_text() == "mine"


def test_an_interruption_between_the_two_files_is_mended(
    finished: Path, episodes: dict[str, Episode]
) -> None:
    whole = finished.read_bytes()
    finished.unlink()
    with pytest.raises(ConfigError):  # the other file alone is not known to be ours
        Generation(PLAN, finished)
    validation = finished.with_name("scene-play-v0-val.npz")
    hidden = validation.rename(validation.with_suffix(".hidden"))
    generation = Generation(PLAN, finished)
    for name, episode in episodes.items():
        generating._save(generation.folder / name, episode)
    hidden.rename(validation)
    generation.finish()
    assert finished.read_bytes() == whole


def test_staged_episodes_of_another_recipe_are_refused(tmp_path: Path) -> None:
    generation = Generation(PLAN, tmp_path / "x.npz")
    with pytest.raises(DatasetError, match="another process"):
        Generation(PLAN, tmp_path / "x.npz")
    generation.close()
    other = Plan(Recipe(name="scene", seed=4, episode_rows=31), PLAN.episodes)
    with pytest.raises(ConfigError, match="of seed 3 and not 4; repeat that command"):
        Generation(other, tmp_path / "x.npz")
    Generation(Plan(RECIPE, {"train": 9, "val": 1}), tmp_path / "x.npz").close()  # only more


def workers() -> list[psutil.Process]:
    """Return the processes that a fork server of this process has made."""
    return [worker for child in psutil.Process().children() for worker in child.children()]


@pytest.mark.slow
def test_workers_and_interruptions_do_not_matter(finished: Path) -> None:
    output = finished.with_name("again.npz")
    stopped = Generation(PLAN, output)
    done: list[int] = []
    assert not stopped.run(1, on_episode=lambda: done.append(1), stop=lambda: bool(done))
    stopped.close()
    assert not output.exists()
    resumed = Generation(PLAN, output)
    assert len(resumed.missing()) == 3
    assert resumed.run(2, on_episode=lambda: done.append(1))
    resumed.finish()
    assert len(done) == 4
    assert output.read_bytes() == finished.read_bytes()
    validation = [output.with_name(f"{stem}-val.npz") for stem in ("again", "scene-play-v0")]
    assert validation[0].read_bytes() == validation[1].read_bytes()
    assert not workers()


@pytest.mark.slow
def test_a_killed_worker_is_named_and_what_is_finished_stays(tmp_path: Path) -> None:
    generation = Generation(PLAN, tmp_path / "x.npz")

    def kill_in_the_second() -> bool:
        if len(generation.missing()) == 3:
            for worker in workers():
                worker.kill()
        return False

    with pytest.raises(EnvironmentFault, match=r"worker 0 was killed by signal 9.*num_workers="):
        generation.run(1, stop=kill_in_the_second)
    assert len(generation.missing()) == 3


def test_files_of_equal_episodes_are_equal(tmp_path: Path, episodes: dict[str, Episode]) -> None:
    generating._save(tmp_path / "a.npz", episodes["train-0000000.npz"])
    for name in ("x.npz", "y.npz"):
        write_npz(tmp_path / name, [tmp_path / "a.npz"] * 2, {"k": 1})
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()


# --- what tasks make of it ---------------------------------------------------------------------


def near_goals(name: str, simulation: object, num_rows: int) -> Episode:
    """Return states of which about half solve any one subtask, and some all."""
    rng = np.random.default_rng(0)
    qpos = rng.uniform(-0.2, 0.2, (num_rows, simulation.model.nq)).astype(np.float32)
    cubes = getattr(simulation, "_num_cubes", 0)
    for index in range(cubes):
        goal = simulation.data.mocap_pos[index]
        first = 14 + 7 * index
        qpos[:, first : first + 3] = goal + rng.uniform(-0.032, 0.032, (num_rows, 3))
    rows = {"qpos": qpos}
    if hasattr(simulation, "_target_button_states"):
        wanted = simulation._target_button_states
        flips = rng.uniform(size=(num_rows, len(wanted))) < 0.1
        rows["button_states"] = np.where(flips, 1 - wanted, wanted).astype(np.int64)
    if name == "scene":
        for column, goal in (
            (-2, simulation._target_drawer_pos),
            (-1, simulation._target_window_pos),
        ):
            # Exactly at the tolerance, too, where the kind of arithmetic decides.
            qpos[:, column] = goal + rng.choice([0.0, 0.039, 0.04, -0.04, 0.041], num_rows)
    return rows


def dataset_of(rows: Episode, length: int) -> OfflineDataset:
    num_rows = len(rows["qpos"])
    columns = {
        "observation": np.zeros((num_rows, 3), np.float32),
        "action": np.zeros((num_rows, 5), np.float32),
        **rows,
    }
    return OfflineDataset(columns, np.arange(length - 1, num_rows, length))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("genpol.data.columns._BLOCK_BYTES", 5000)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["cube-double", "scene", "puzzle-4x4"])
def test_labels_are_those_of_ogbench(name: str) -> None:
    from genpol.envs import ogbench_relabel

    env = ogbench.make_env_and_datasets(f"{name}-play-singletask-task5-v0", env_only=True)
    env.reset()
    rows = near_goals(name, env.unwrapped, 400)
    dataset = dataset_of(rows, 20)
    expected = {key: values.copy() for key, values in rows.items()}
    ogbench.relabel_utils.relabel_dataset(name, env, expected)
    ogbench.relabel_utils.add_oracle_reps(name, env, expected)
    last = np.zeros(400, bool)
    last[dataset.ends] = True
    solved = expected["masks"] == 0
    assert 0.05 < solved.mean() < 0.95

    found = ogbench_relabel.relabel(dataset, OGBenchSettings(name=name, task=5)).columns
    np.testing.assert_array_equal(found["reward"], np.where(last, 0, expected["rewards"]))
    np.testing.assert_array_equal(found["terminated"], solved & ~last)
    np.testing.assert_array_equal(found["success"], solved & ~last)

    post = OGBenchSettings(name=name, task=5, success_timing="post")
    found = ogbench_relabel.relabel(dataset, post).columns
    following = np.roll(expected["rewards"], -1)
    np.testing.assert_array_equal(found["reward"], np.where(last, 0, following))
    np.testing.assert_array_equal(found["terminated"], np.roll(solved, -1) & ~last)

    goal = OGBenchSettings(name=name, goal_conditioned=True)
    found = ogbench_relabel.relabel(dataset, goal).columns
    assert found["goal"].dtype == np.float32
    np.testing.assert_array_equal(found["goal"], expected["oracle_reps"])


def test_generated_file_is_read_and_labelled_alike(finished: Path, tmp_path: Path) -> None:
    from genpol.envs.ogbench_relabel import relabel

    train, validation = ogbench.make_env_and_datasets(
        "scene-play-singletask-task1-v0", dataset_path=str(finished), add_info=True
    )[1:]
    assert len(validation["observations"]) == 30
    settings = OGBenchSettings(name="scene", task=1)
    dataset = relabel(open_dataset(finished, cache=tmp_path / "cache"), settings)
    assert isinstance(dataset.columns["qpos"], np.memmap)
    steps = dataset.transition_row(np.arange(dataset.num_transitions))
    for ours, theirs in (("observation", "observations"), ("action", "actions")):
        np.testing.assert_array_equal(dataset.columns[ours][steps], train[theirs])
    np.testing.assert_array_equal(
        dataset.columns["observation"][steps + 1], train["next_observations"]
    )
    np.testing.assert_array_equal(dataset.columns["reward"][steps], train["rewards"])
    np.testing.assert_array_equal(~dataset.columns["terminated"][steps], train["masks"] == 1)
    assert dataset.truncated.sum() == 3
    dataset.validate()


def test_labels_can_be_written_to_given_arrays() -> None:
    from genpol.envs import ogbench_relabel

    rows = {"button_states": np.ones((6, 9), np.int64), "qpos": np.zeros((6, 23), np.float32)}
    settings = OGBenchSettings(name="puzzle-3x3", goal_conditioned=True)
    out = np.zeros((6, 9), np.float32)
    assert ogbench_relabel.goals(dataset_of(rows, 3), settings, out)["goal"] is out
    assert (out == 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.pop("button_states"), "column button_states is missing: puzzle-3x3"),
        (
            lambda rows: rows.update(button_states=np.zeros((6, 16), np.int64)),
            r"has shape \(16,\) a row, but puzzle-3x3 has \(9,\)",
        ),
    ],
)
def test_data_that_cannot_be_labelled_are_refused(
    change: Callable[[Episode], object], message: str
) -> None:
    from genpol.envs.ogbench_relabel import relabel

    rows = {"button_states": np.ones((6, 9), np.int64), "qpos": np.zeros((6, 23), np.float32)}
    change(rows)
    with pytest.raises(DatasetError, match=message):
        relabel(dataset_of(rows, 3), OGBenchSettings(name="puzzle-3x3"))


@pytest.mark.slow
@pytest.mark.parametrize("name", OGBENCH_NAMES)
@pytest.mark.parametrize("kind", ["play", "noisy"])
def test_every_environment_has_a_recipe(name: str, kind: str) -> None:
    rows = Demonstrator(Recipe(name=name, kind=kind, episode_rows=301)).episode("train", 0)
    assert all(np.isfinite(values).all() for values in rows.values())
    objects = rows["qpos"][:, 14:]
    assert (objects.max(0) - objects.min(0)).max() > 0.02  # something was moved or pressed
