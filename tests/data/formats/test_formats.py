"""What holds for every format: detection, the cache, whole or absent, and nothing half read."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
import zlib

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genpol.data import formats, npy
from genpol.data.actions import ActionRange
from genpol.data.dataset import OfflineDataset
from genpol.data.formats import open_dataset
from genpol.data.sink import MemorySink
from genpol.data.staging import Staging
from genpol.errors import ConfigError, DatasetError, MissingExtraError

FOLDER = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15
)
TARGETS = {"genpol": "data", "ogbench": "data.npz", "minari": "data-v0"}


def assert_equal(found, expected):
    assert found.columns.keys() == expected.columns.keys()
    assert found.ends.tolist() == expected.ends.tolist()
    for name, column in expected.columns.items():
        assert found.columns[name].dtype == column.dtype
        assert np.array_equal(found.columns[name], column), name


@pytest.fixture
def no_flush(monkeypatch):
    """Leave out what only matters to power cuts, which tests do not make."""
    for module in ("store", "staging"):
        monkeypatch.setattr(f"genpol.data.{module}.flush", lambda path: None)


@pytest.fixture
def files(
    ogbench_file, d4rl_file, d4rl_arrays, robomimic_file, minari_folder, minari_episode,
    lerobot_folder, lerobot_frames, mcap_file, tmp_path, steps,
):  # fmt: skip
    """Return a path of each format."""
    formats.write(OfflineDataset.from_trajectories([steps(2, 0)]), tmp_path / "native")
    return {
        "genpol": tmp_path / "native",
        "ogbench": ogbench_file,
        "d4rl": d4rl_file(d4rl_arrays),
        "robomimic": robomimic_file,
        "minari": minari_folder([minari_episode(3, 0), minari_episode(2, 1)]),
        "lerobot": lerobot_folder(lerobot_frames),
        "mcap": mcap_file,
    }


def test_every_format_is_known_by_its_content(files):
    assert files.keys() == formats.FORMATS.keys()
    assert {name: formats.detect(path) for name, path in files.items()} == {n: n for n in files}


def test_a_name_says_nothing_of_the_format(files, tmp_path):
    for name in ("ogbench", "d4rl", "robomimic"):
        renamed = files[name].rename(tmp_path / f"{name}.bin")
        assert formats.detect(renamed) == name


def test_every_format_says_where_it_came_from(files, load):
    for name in formats.FORMATS.keys() - {"genpol"}:
        metadata = load(files[name]).metadata
        assert (metadata["format"], metadata["source"]) == (name, str(files[name]))


@pytest.mark.parametrize("content", [b"", b"P", b"hello", b"\x89HDF", b"PK\x05\x06"])
def test_an_unknown_format_is_refused_with_those_that_are_known(tmp_path, content, refusal):
    path = tmp_path / "data"
    path.write_bytes(content)
    message = refusal(path)
    assert message.startswith(
        f"{path}: of no known format, or cut short. Known are genpol: a folder"
    )
    assert all(f"{name}: " in message for name in formats.FORMATS)


def test_an_empty_folder_is_of_no_format(tmp_path, refusal):
    assert "of no known format" in refusal(tmp_path)


def test_a_misspelt_path_is_told_the_nearest(tmp_path):
    (tmp_path / "walker").touch()
    with pytest.raises(DatasetError, match=r"wakler: no such .* Did you mean 'walker'\?"):
        formats.detect(tmp_path / "wakler")


def test_a_missing_package_is_named_with_its_extra(files, monkeypatch):
    def fail(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("genpol.errors.importlib.import_module", fail)
    from genpol.data.formats import d4rl, lerobot

    for module, name in ((d4rl, "d4rl"), (lerobot, "lerobot")):
        with pytest.raises(MissingExtraError, match=r"pip install 'genpol\[data\]'"):
            module.read(files[name], MemorySink())


# --- the cache ---------------------------------------------------------------------------------


def test_a_file_is_converted_once(ogbench_file, tmp_path, load, monkeypatch):
    cache = tmp_path / "cache"
    first = open_dataset(ogbench_file, cache=cache)
    monkeypatch.setattr("genpol.data.formats._convert", None)
    again = open_dataset(str(ogbench_file), cache=cache)
    assert isinstance(again.columns["observation"], np.memmap)
    assert_equal(again, load(ogbench_file))
    assert_equal(first, again)
    (entry,) = cache.iterdir()
    assert entry.name.startswith("cube-single-play-v0-")


def test_a_changed_file_is_converted_anew(tmp_path, ogbench_arrays):
    path, cache = tmp_path / "a.npz", tmp_path / "cache"
    for value in (1, 2):
        np.savez(path, **ogbench_arrays | {"qpos": np.full(7, value)})
        data = open_dataset(path, cache=cache)
        assert data.columns["qpos"][0] == value
    assert len(list(cache.iterdir())) == 2


def test_a_file_within_a_folder_is_seen_to_change(files, tmp_path):
    before = formats._cache_name(files["lerobot"])
    (files["lerobot"] / "meta/info.json").touch()
    assert formats._cache_name(files["lerobot"]) != before


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({"GENPOL_CACHE": "there"}, "there/datasets"), ({}, "home/.cache/genpol/datasets")],
)
def test_the_cache_is_where_the_environment_says(
    ogbench_file, tmp_path, monkeypatch, environ, expected
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("GENPOL_CACHE", raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    open_dataset(ogbench_file)
    assert len(list((tmp_path / expected).iterdir())) == 1


def test_a_terminal_is_told_how_far_it_is(ogbench_file, tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    open_dataset(ogbench_file, cache=tmp_path / "cache")
    assert "reading cube-single-play-v0.npz: 7 rows" in terminal.getvalue()


def test_a_native_store_is_not_cached(files, tmp_path):
    open_dataset(files["genpol"], cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_refused_file_leaves_no_cache(tmp_path, ogbench_arrays):
    np.savez(tmp_path / "a.npz", **ogbench_arrays | {"actions": np.full((7, 2), 9.0)})
    with pytest.raises(DatasetError, match="9 is outside"):
        open_dataset(tmp_path / "a.npz", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_damaged_cache_is_named(ogbench_file, tmp_path):
    open_dataset(ogbench_file, cache=tmp_path / "cache")
    (entry,) = (tmp_path / "cache").iterdir()
    (entry / "ends.npy").unlink()
    with pytest.raises(DatasetError, match=f"ends.npy: missing.*: remove {entry}, it is only a"):
        open_dataset(ogbench_file, cache=tmp_path / "cache")


def test_another_process_may_have_converted_it_meanwhile(ogbench_file, tmp_path, monkeypatch):
    convert = formats._convert

    def slow(path, target, *, wait):
        convert(path, target, wait=wait)  # the other process
        convert(path, target, wait=wait)

    monkeypatch.setattr(formats, "_convert", slow)
    assert open_dataset(ogbench_file, cache=tmp_path / "cache").num_trajectories == 2


# --- writing -----------------------------------------------------------------------------------


def any_dataset(lengths, seed, with_flags):
    rng = np.random.default_rng(seed)
    made = []
    for length in lengths:
        made.append(
            {
                "observation": rng.normal(size=(length + 1, 2)),
                "action": rng.uniform(-1, 1, (length, 1)),
                "qpos": rng.normal(size=(length + 1, 3)),
                "goal": rng.normal(size=(length + 1, 1)),
                "button_states": rng.integers(0, 9, (length + 1, 2)),
                "infos.other": rng.integers(0, 9, (length + 1, 2, 2), dtype=np.int16),
            }
        )
        if with_flags:
            made[-1] |= {
                "reward": rng.normal(size=length),
                "terminated": rng.integers(0, 2, length),
                "success": rng.integers(0, 2, length),
            }
    return OfflineDataset.from_trajectories(made, {"env": "toy", "note": "more"})


@FOLDER
@given(
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    with_flags=st.booleans(),
)
@pytest.mark.parametrize("name", formats.WRITABLE)
def test_what_is_written_comes_back(tmp_path, no_flush, load, name, lengths, seed, with_flags):
    path = tmp_path / TARGETS[name]
    if path.exists():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    data = any_dataset(lengths, seed, with_flags)
    formats.write(data, path, name)
    assert formats.detect(path) == name
    assert_equal(load(path), data)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", formats.WRITABLE)
def test_metadata_comes_back(tmp_path, load, name):
    formats.write(any_dataset([2], 0, True), tmp_path / TARGETS[name], name)
    metadata = load(tmp_path / TARGETS[name]).metadata
    assert (metadata["env"], metadata["note"]) == ("toy", "more")


@pytest.mark.parametrize("name", formats.WRITABLE)
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_nothing_is_overwritten(tmp_path, name, kind):
    path = tmp_path / TARGETS[name]
    {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to("nowhere")}[kind]()
    with pytest.raises(DatasetError, match="exists; nothing is overwritten"):
        formats.write(any_dataset([2], 0, True), path, name)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["ogbench", "minari"])
def test_nothing_that_came_up_meanwhile_is_overwritten(tmp_path, name, monkeypatch):
    path = tmp_path / TARGETS[name]
    data = any_dataset([2], 0, True)
    real = np.zeros

    def zeros(*args, **kwargs):
        path.touch()  # while the data set is being written
        return real(*args, **kwargs)

    monkeypatch.setattr(np, "zeros", zeros)
    with pytest.raises(DatasetError, match="exists; nothing is overwritten"):
        formats.write(data, path, name)
    assert path.read_bytes() == b""
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["ogbench", "minari"])
def test_a_failure_leaves_nothing_behind(tmp_path, name, monkeypatch):
    data = any_dataset([2], 0, True)
    data.columns["qpos"] = None  # fails when it comes to this column
    with pytest.raises((TypeError, AttributeError)):
        formats.write(data, tmp_path / TARGETS[name], name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["d4rl", "robomimic", "lerobot"])
def test_what_is_only_read_is_not_written(tmp_path, name):
    with pytest.raises(ConfigError, match=f"format = '{name}': is only read, not written; must be"):
        formats.write(any_dataset([2], 0, True), tmp_path / "data", name)


def test_a_misspelt_format_is_told_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"'minary': is no format; .* Did you mean 'minari'\?"):
        formats.write(any_dataset([2], 0, True), tmp_path / "data", "minary")


@pytest.mark.parametrize(
    ("name", "target", "expected"),
    [
        ("genpol", "there", "there: exists; nothing is overwritten"),
        ("minari", "there-v0", "there-v0: exists; nothing is overwritten"),
        ("minari", "data", "end in a version, such as data-v0"),
        ("ogbench", "data-v0", r"data-v0: must end in \.npz"),
    ],
)
def test_a_target_is_refused_beforehand_as_it_is_in_the_end(tmp_path, name, target, expected):
    for there in ("there", "there-v0"):
        (tmp_path / there).mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DatasetError, match=expected) as early:
        formats.check_target(tmp_path / target, name)
    with pytest.raises(DatasetError) as late:
        formats.write(any_dataset([2], 0, True), tmp_path / target, name)
    assert str(early.value) == str(late.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_target_is_refused_before_the_source_is_read(ogbench_file, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "read", None)
    with pytest.raises(DatasetError, match="end in a version"):
        formats.convert(ogbench_file, tmp_path / "data", "minari")


@pytest.mark.parametrize("name", formats.WRITABLE)
def test_what_is_placed_is_what_the_store_holds(tmp_path, load, name):
    data = any_dataset([2, 3], 0, True)
    target = tmp_path / TARGETS[name]
    staging = Staging(target)
    formats.write(data, staging.folder / "store")
    formats.place(staging.folder / "store", staging, name)
    assert_equal(load(target), data)
    assert formats.detect(target) == name
    assert [entry.name for entry in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("name", formats.WRITABLE)
def test_a_store_outlives_a_failure_to_place_it(tmp_path, name):
    target = tmp_path / TARGETS[name]
    staging = Staging(target)
    store = staging.folder / "store"
    formats.write(any_dataset([2, 3], 0, True), store)
    target.touch()
    with pytest.raises(DatasetError, match="exists; nothing is overwritten"):
        formats.place(store, staging, name)
    assert [entry.name for entry in staging.folder.iterdir()] == ["store"]
    assert open_dataset(store).num_trajectories == 2


@pytest.mark.parametrize("name", formats.WRITABLE)
def test_actions_are_scaled_on_the_way(files, tmp_path, load, name):
    given = ActionRange(np.array([-2.0, 0.0]), np.array([2.0, 2.0]))
    with h5py.File(files["d4rl"], "a") as file:
        file["actions"][0] = [1.5, 2.0]
        file["actions"][1:, 1] = 0.5
    target = tmp_path / f"new-{TARGETS[name]}"
    formats.convert(files["d4rl"], target, name, action_range=given)
    data = load(target)
    assert data.columns["action"][:2].tolist()[0] == [0.75, 1]
    assert set(data.columns["action"][1:3, 1]) == {-0.5}
    assert (data.metadata["action_low"], data.metadata["action_high"]) == ([-2, 0], [2, 2])
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("name", formats.FORMATS)
def test_actions_of_every_format_are_scaled(files, tmp_path, load, name):
    given = ActionRange(np.array([-2.0, -1.0]), np.array([2.0, 3.0]))
    formats.convert(files[name], tmp_path / "scaled", action_range=given)
    before, after = load(files[name]), open_dataset(tmp_path / "scaled")
    rows = before.transition_row(np.arange(before.num_transitions))
    expected = (before.columns["action"][rows].astype(np.float64) - [0, 1]) / 2
    assert np.array_equal(after.columns["action"][rows], expected.astype(np.float32))
    assert not after.columns["action"][after.ends].any()
    assert (after.metadata["action_low"], after.metadata["action_high"]) == ([-2, -1], [2, 3])


@pytest.mark.parametrize("name", formats.FORMATS)
def test_the_range_of_any_file_can_be_found(files, load, name):
    found = formats.find_action_range(files[name])
    data = load(files[name])
    actions = data.columns["action"][data.transition_row(np.arange(data.num_transitions))]
    assert np.array_equal(found.low.astype(np.float32), actions.min(axis=0))
    assert np.array_equal(found.high.astype(np.float32), actions.max(axis=0))


def test_what_is_given_goes_before_what_the_file_says(files, tmp_path):
    metadata = files["minari"] / "data/metadata.json"
    space = {"type": "Box", "dtype": "float32", "shape": [2], "low": [-9, -9], "high": [9, 9]}
    described = json.loads(metadata.read_text()) | {"action_space": json.dumps(space)}
    metadata.write_text(json.dumps(described))
    given = ActionRange(np.array([-2.0]), np.array([2.0]))
    formats.convert(files["minari"], tmp_path / "scaled", action_range=given)
    data = open_dataset(tmp_path / "scaled")
    assert data.metadata["action_high"] == [2, 2]
    assert 0.2 < np.abs(data.columns["action"]).max() <= 0.5


# --- damage ------------------------------------------------------------------------------------


def _parts(path):
    """Return the files whose content is read."""
    if path.is_file():
        return [path]
    return sorted(file for file in path.rglob("*") if file.is_file())


@settings(FOLDER, max_examples=40)
@given(draw=st.data())
def test_a_file_cut_at_any_byte_is_refused(files, draw):
    name = draw.draw(st.sampled_from(sorted(files)))
    file = draw.draw(st.sampled_from(_parts(files[name])))
    content = file.read_bytes()
    file.write_bytes(content[: draw.draw(st.integers(0, len(content) - 1))])
    try:
        with pytest.raises(DatasetError) as caught:
            formats.validate(files[name])
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith(str(files[name]))
    finally:
        file.write_bytes(content)


@settings(FOLDER, max_examples=40, derandomize=True)
@given(draw=st.data())
def test_changed_bytes_are_refused_or_read_but_never_crash(files, draw):
    """Parquet and HDF5 have no checksums by default; what they let through must not break us."""
    name = draw.draw(st.sampled_from(sorted(files)))
    file = draw.draw(st.sampled_from(_parts(files[name])))
    content = file.read_bytes()
    changed = bytearray(content)
    place = draw.draw(st.integers(0, len(content) - 1))
    changed[place] = draw.draw(st.integers(0, 255))
    file.write_bytes(changed)
    try:
        with contextlib.suppress(DatasetError):
            formats.validate(files[name])
    finally:
        file.write_bytes(content)


def test_validation_counts(files):
    assert formats.validate(files["minari"]) == (2, 5)
    assert formats.validate(files["genpol"]) == (1, 2)


def test_validation_names_the_row_of_a_store(tmp_path):
    path = tmp_path / "data"
    formats.write(any_dataset([2, 2], 0, True), path)
    reward = np.load(path / "reward.npy")
    reward[2] = 1.0  # at a final state
    header = (path / "reward.npy").read_bytes()[: npy.HEADER_BYTES]
    (path / "reward.npy").write_bytes(header + reward.tobytes())
    description = json.loads((path / "dataset.json").read_text())
    description["columns"]["reward"]["crc32"] = zlib.crc32(reward.tobytes())
    (path / "dataset.json").write_text(json.dumps(description))
    with pytest.raises(DatasetError, match=f"{path}: reward row 2: is not zero"):
        formats.validate(path)


def test_validation_reads_the_values_of_a_store(files):
    file = files["genpol"] / "observation.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    open_dataset(files["genpol"])
    with pytest.raises(DatasetError, match=r"observation\.npy: damaged, its CRC-32"):
        formats.validate(files["genpol"])
