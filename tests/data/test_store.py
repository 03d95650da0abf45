"""The native store: mapped and not read, and never read when it is damaged."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genpol.data import npy
from genpol.data.dataset import OfflineDataset
from genpol.data.store import DatasetWriter, open_store, read, verify_checksums, write
from genpol.errors import DatasetError

FOLDER = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40
)


def trajectory(number, num_steps=3):
    """Return a trajectory that no other number has."""
    rng = np.random.default_rng(number)
    return {
        "observation": rng.normal(size=(num_steps + 1, 2)),
        "action": rng.uniform(-1, 1, (num_steps, 1)),
        "reward": rng.normal(size=num_steps),
        "terminated": np.arange(num_steps) == num_steps - 1,
        "qpos": rng.normal(size=(num_steps + 1, 3)),
    }


def data_of(*numbers):
    return OfflineDataset.from_trajectories(map(trajectory, numbers))


def assert_equal(found, expected):
    assert found.columns.keys() == expected.columns.keys()
    assert found.ends.tolist() == expected.ends.tolist()
    for name, column in expected.columns.items():
        assert found.columns[name].dtype == column.dtype
        assert np.array_equal(found.columns[name], column, equal_nan=True), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def no_flush(monkeypatch):
    """Leave out what only matters to power cuts, which tests do not make."""
    for module in ("store", "staging"):
        monkeypatch.setattr(f"genpol.data.{module}.flush", lambda path: None)


# --- reading -----------------------------------------------------------------------------------


def test_columns_are_mapped_and_cannot_be_written_to(path):
    write(data_of(0, 1), path)
    columns = open_store(path).columns
    assert all(isinstance(column, np.memmap) for column in columns.values())
    with pytest.raises(ValueError, match="read-only"):
        columns["observation"][0] = 0


def test_metadata_comes_back(path):
    with DatasetWriter(path, metadata={"env": "toy"}) as writer:
        writer.append_trajectory(trajectory(0))
        writer.metadata["note"] = [1, {"a": None}]
    assert open_store(path).metadata == {"env": "toy", "note": [1, {"a": None}]}


def test_numpy_alone_reads_the_files(path):
    write(data_of(0), path)
    assert np.array_equal(np.load(path / "observation.npy"), data_of(0).columns["observation"])
    assert np.load(path / "ends.npy").tolist() == [3]


def any_trajectory(num_steps, seed):
    """Return a trajectory of numbers of every size, in columns of several types."""
    rng = np.random.default_rng(seed)
    observation = rng.integers(0, 2**32, (num_steps + 1, 2), dtype=np.uint32).view(np.float32)
    return {
        "observation": np.where(np.isfinite(observation), observation, 0),
        "action": rng.uniform(-1, 1, (num_steps, 3)),
        "success": rng.integers(0, 2, num_steps),
        "button_states": rng.integers(-(2**62), 2**62, (num_steps + 1, 1)),
        "other": rng.integers(0, 2**16, (num_steps + 1, 2, 2), dtype=np.uint16).view(np.float16),
    }


@FOLDER
@given(made=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 1000)), min_size=1, max_size=4))
def test_what_was_written_is_read(tmp_path, no_flush, made):
    folder = tmp_path / "data"
    shutil.rmtree(folder, ignore_errors=True)
    expected = OfflineDataset.from_trajectories(any_trajectory(*each) for each in made)
    write(expected, folder)
    assert_equal(open_store(folder), expected)
    verify_checksums(folder)


def test_a_store_is_copied_from_one_to_another(path, monkeypatch):
    write(data_of(0, 1, 2), path)
    monkeypatch.setattr("genpol.data.columns._BLOCK_BYTES", 200)  # blocks within trajectories
    with DatasetWriter(path.with_name("copy")) as writer:
        read(path, writer)
    assert_equal(open_store(path.with_name("copy")), data_of(0, 1, 2))


def test_ten_million_transitions_are_opened_without_being_read(path):
    """The columns are holes of 4 GB in a file, in a process that may have 1 GB of memory."""
    num_rows, length = 10_010_000, 1001
    path.mkdir()
    entries = {}
    for name, width in (("observation", 95), ("action", 5)):
        shape = (num_rows, width)
        with (path / f"{name}.npy").open("wb") as file:
            file.write(npy.header(np.dtype("<f4"), shape))
            file.truncate(npy.HEADER_BYTES + 4 * num_rows * width)
        entries[name] = npy.Contents(np.dtype("<f4"), shape, 0).to_json()
    ends = np.arange(length - 1, num_rows, length)
    (path / "ends.npy").write_bytes(npy.header(ends.dtype, ends.shape) + ends.tobytes())
    contents = npy.Contents(ends.dtype, ends.shape, 0).to_json()
    description = {"format": "genpol-dataset", "version": 1, "columns": entries, "ends": contents}
    (path / "dataset.json").write_text(json.dumps(description | {"metadata": {}}))
    script = (
        "import sys, resource, pathlib; from genpol.data.store import open_store\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (1 << 30, 1 << 30))\n"
        "data = open_store(pathlib.Path(sys.argv[1]))\n"
        "row = data.transition_row(data.num_transitions - 1)\n"
        "print(data.num_transitions, row, data.columns['observation'][row + 1].sum())"
    )
    command = [sys.executable, "-c", script, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["10000000", "10009998", "0.0"]


# --- damage ------------------------------------------------------------------------------------


@FOLDER
@given(data=st.data())
def test_a_store_cut_at_any_byte_is_refused(tmp_path, data):
    folder = tmp_path / "data"
    if not folder.exists():
        write(data_of(0, 1), folder)
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = file.read_bytes()
    file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        with pytest.raises(DatasetError) as caught:
            open_store(folder)
        assert str(caught.value).startswith(f"{file}: ")
        assert "\n" not in str(caught.value)
    finally:
        file.write_bytes(content)


def test_a_file_with_more_than_was_written_is_refused(path):
    write(data_of(0), path)
    with (path / "reward.npy").open("ab") as file:
        file.write(b"more")
    with pytest.raises(DatasetError, match=r"reward\.npy: damaged, 276 bytes instead of 272"):
        open_store(path)


@pytest.mark.parametrize("name", ["observation", "reward", "ends"])
def test_a_changed_byte_is_found_by_the_checksums(path, name):
    write(data_of(0, 1), path)
    file = path / f"{name}.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DatasetError, match=f"{name}.npy: damaged, its CRC-32"):
        verify_checksums(path)


@pytest.mark.parametrize("name", ["observation.npy", "ends.npy", "dataset.json"])
def test_a_missing_file_is_named(path, name):
    write(data_of(0), path)
    (path / name).unlink()
    with pytest.raises(DatasetError, match=f"{name}: missing"):
        open_store(path)


def describe(path, **changes):
    file = path / "dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"version": 2}, "version 2, this genpol"),
        ({"format": "other"}, "does not describe a genpol-dataset"),
        ({"columns": {}}, "column observation is missing"),
        ({"columns": {"action": {}}}, "damaged, it lacks entries"),
        ({"metadata": None}, "damaged, it lacks entries"),
    ],
)
def test_a_foreign_description_is_refused(path, changes, expected):
    write(data_of(0), path)
    describe(path, **changes)
    with pytest.raises(DatasetError, match=expected):
        open_store(path)


def test_a_header_that_contradicts_the_description_is_refused(path):
    write(data_of(0), path)
    file = path / "observation.npy"
    data = file.read_bytes()[npy.HEADER_BYTES :]
    file.write_bytes(npy.header(np.dtype("<f4"), (2, 4)) + data)
    with pytest.raises(DatasetError, match="its header does not say float32"):
        open_store(path)
