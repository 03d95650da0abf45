"""The writer of native stores: whole or absent, and resumed after any interruption."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from genpol.data import npy
from genpol.data.columns import Source
from genpol.data.dataset import OfflineDataset
from genpol.data.store import DatasetWriter, open_store, verify_checksums
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


def staging(path):
    return path.with_name(f".tmp-{path.name}")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def no_flush(monkeypatch):
    """Leave out what only matters to power cuts, which tests do not make."""
    for module in ("store", "staging"):
        monkeypatch.setattr(f"genpol.data.{module}.flush", lambda path: None)


# --- writing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_nothing_is_overwritten(path, kind):
    {"file": path.touch, "folder": path.mkdir, "link": lambda: path.symlink_to("nowhere")}[kind]()
    with pytest.raises(DatasetError, match="exists; nothing is overwritten"):
        DatasetWriter(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["data"]


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir])
def test_nothing_that_came_up_meanwhile_is_overwritten(path, make):
    writer = DatasetWriter(path)
    writer.append_trajectory(trajectory(0))
    make(path)
    with pytest.raises(DatasetError, match="exists; nothing is overwritten"):
        writer.finish()
    writer.close()
    assert staging(path).exists()


def test_an_exception_leaves_nothing_behind(path):
    def record():
        with DatasetWriter(path) as writer:
            writer.append_trajectory(trajectory(0))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        record()
    assert list(path.parent.iterdir()) == []


def test_a_refused_trajectory_leaves_nothing_behind(path):
    def record():
        with DatasetWriter(path) as writer:
            writer.append_trajectory(trajectory(0))
            writer.append_trajectory(trajectory(1) | {"reward": [0, np.nan, 0]})

    with pytest.raises(DatasetError, match="reward row 1"):
        record()
    assert list(path.parent.iterdir()) == []


def test_a_refused_trajectory_can_be_left_out(path):
    with DatasetWriter(path) as writer:
        writer.append_trajectory(trajectory(0))
        with pytest.raises(DatasetError):
            writer.append_trajectory(trajectory(1) | {"reward": [0, np.nan, 0]})
        writer.append_trajectory(trajectory(2))
    assert_equal(open_store(path), data_of(0, 2))


def test_a_trajectory_may_come_in_pieces(path):
    whole = data_of(0, 1)
    last = np.zeros(whole.num_rows, dtype=bool)
    last[whole.ends] = True
    with DatasetWriter(path) as writer:
        for begin, stop in ((0, 2), (2, 3), (3, 7), (7, 8)):
            rows = {name: column[begin:stop] for name, column in whole.columns.items()}
            writer.append_rows(rows, last[begin:stop])
    assert_equal(open_store(path), whole)


def test_a_trajectory_that_never_ends_is_refused(path):
    writer = DatasetWriter(path)
    writer.append_trajectory(trajectory(0))
    rows = {name: column[:3] for name, column in data_of(1).columns.items()}
    writer.append_rows(rows, [False] * 3)
    with pytest.raises(DatasetError, match="the last trajectory, 3 rows from row 4 on, never ends"):
        writer.finish()
    with pytest.raises(DatasetError, match="begins before the one that is being appended"):
        writer.append_trajectory(trajectory(2))
    writer.abort()


def test_an_empty_store_is_refused(path):
    with pytest.raises(DatasetError, match="there is no trajectory"), DatasetWriter(path):
        pass
    assert list(path.parent.iterdir()) == []


def test_a_row_is_named_by_its_source(path):
    source = Source(file="a.npz", names={"reward": "rewards"}, rows=range(100, 104))
    with (
        pytest.raises(DatasetError, match=r"a\.npz: rewards row 102: nan"),
        DatasetWriter(path) as w,
    ):
        w.append_trajectory(trajectory(0) | {"reward": [0, 0, np.nan]}, source=source)


def test_two_writers_do_not_meet(path):
    first = DatasetWriter(path)
    first.append_trajectory(trajectory(0))
    for make in (DatasetWriter, DatasetWriter.resume):
        with pytest.raises(DatasetError, match="another process is writing it"):
            make(path)
    first.finish()
    assert_equal(open_store(path), data_of(0))


@pytest.mark.parametrize("succeeds", [True, False])
def test_a_writer_may_wait_for_another(path, succeeds):
    first = DatasetWriter(path)
    first.append_trajectory(trajectory(0))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(DatasetWriter, path, wait=True)
        time.sleep(0.1)
        assert not waiting.done()
        (first.finish if succeeds else first.abort)()
        if succeeds:
            with pytest.raises(DatasetError, match="exists; nothing is overwritten"):
                waiting.result(timeout=60)
        else:
            second = waiting.result(timeout=60)
            second.append_trajectory(trajectory(1))
            second.finish()
    assert_equal(open_store(path), data_of(0 if succeeds else 1))


def test_a_closed_writer_says_so(path):
    with DatasetWriter(path) as writer:
        writer.append_trajectory(trajectory(0))
    with pytest.raises(DatasetError, match="the writer is closed"):
        writer.append_trajectory(trajectory(1))


@pytest.mark.skipif(sys.platform == "win32", reason="no limits on the size of files")
def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(path):
    script = (
        "import sys, resource, pathlib, numpy as np\n"
        "from genpol.data.store import DatasetWriter\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "rows = {'observation': np.zeros((1000, 4)), 'action': np.zeros((1000, 1))}\n"
        "try:\n"
        "    with DatasetWriter(pathlib.Path(sys.argv[1])) as writer:\n"
        "        for _ in range(100):\n"
        "            writer.append_trajectory(rows)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)"
    )
    command = [sys.executable, "-c", script, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == (
        f"DatasetError {path}: cannot be written (File too large); free some disk space\n"
    )
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(path):
    path.touch()
    with pytest.raises(DatasetError, match="cannot be written"):
        DatasetWriter(path / "below" / "data")


# --- resuming ----------------------------------------------------------------------------------


def interrupted(path, *, trajectories=2, rows=2):
    """Leave what a writer leaves that stops within its third trajectory."""
    writer = DatasetWriter(path, metadata={"env": "toy"})
    for number in range(trajectories):
        writer.append_trajectory(trajectory(number))
    begun = {name: column[:rows] for name, column in data_of(9).columns.items()}
    writer.append_rows(begun, [False] * rows)
    writer.close()


def test_a_writer_goes_on_after_the_last_whole_trajectory(path):
    interrupted(path)
    assert not path.exists()
    writer = DatasetWriter.resume(path, metadata={"note": 1})
    assert (writer.num_trajectories, writer.num_transitions, writer.open_rows) == (2, 6, 0)
    assert writer.metadata == {"env": "toy", "note": 1}
    writer.append_trajectory(trajectory(2))
    writer.finish()
    assert_equal(open_store(path), data_of(0, 1, 2))
    verify_checksums(path)


def test_a_resumed_store_is_the_same_to_the_byte(path):
    interrupted(path)
    with DatasetWriter.resume(path) as writer:
        writer.append_trajectory(trajectory(2))
    with DatasetWriter(path.with_name("other"), metadata={"env": "toy"}) as writer:
        for number in range(3):
            writer.append_trajectory(trajectory(number))
    for file in path.iterdir():
        assert file.read_bytes() == (path.with_name("other") / file.name).read_bytes(), file
    assert len(list(path.iterdir())) == len(list(path.with_name("other").iterdir()))


def test_nothing_to_resume_is_a_beginning(path):
    with DatasetWriter.resume(path) as writer:
        assert writer.num_trajectories == 0
        writer.append_trajectory(trajectory(0))
    assert_equal(open_store(path), data_of(0))


def test_a_new_writer_removes_what_another_left(path):
    interrupted(path)
    given = trajectory(7)
    del given["qpos"]
    with DatasetWriter(path) as writer:
        assert writer.num_trajectories == 0
        writer.append_trajectory(given)
    assert_equal(open_store(path), OfflineDataset.from_trajectories([given]))
    columns = {"observation.npy", "action.npy", "reward.npy", "terminated.npy"}
    assert {file.name for file in path.iterdir()} == columns | {"ends.npy", "dataset.json"}
    assert [entry.name for entry in path.parent.iterdir()] == ["data"]


def test_a_resumed_writer_wants_the_same_columns(path):
    interrupted(path)
    given = trajectory(2)
    del given["reward"]
    with pytest.raises(DatasetError, match="reward: is not given"), DatasetWriter.resume(path) as w:
        w.append_trajectory(given)


def test_a_failure_of_the_last_move_is_resumed(path, monkeypatch):
    def fail(self, made):
        raise OSError("power cut")

    writer = DatasetWriter(path)
    writer.append_trajectory(trajectory(0))
    with monkeypatch.context() as patched:
        patched.setattr("genpol.data.store.Staging.place", fail)
        with pytest.raises(OSError, match="power cut"):
            writer.finish()
    writer.close()
    with DatasetWriter.resume(path) as writer:
        writer.append_trajectory(trajectory(1))
    assert_equal(open_store(path), data_of(0, 1))


@FOLDER
@given(data=st.data())
def test_whatever_reached_the_disk_is_resumed(tmp_path, no_flush, data):
    """A cut or a changed byte in a file loses trajectories from there on, and none before."""
    for entry in tmp_path.iterdir():
        shutil.rmtree(entry)
    path = tmp_path / "data"
    interrupted(path, trajectories=3)
    file = data.draw(st.sampled_from(sorted(staging(path).iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if file.suffix == ".npy" and place >= npy.HEADER_BYTES and data.draw(st.booleans()):
        content[place] ^= 0xFF
    else:
        del content[place:]
    file.write_bytes(content)
    writer = DatasetWriter.resume(path)
    kept = writer.num_trajectories
    if file.suffix == ".npy" and place >= npy.HEADER_BYTES:
        width = {"observation": 8, "action": 4, "reward": 4, "terminated": 1, "qpos": 24}[file.stem]
        assert kept == min(3, (place - npy.HEADER_BYTES) // (4 * width))
    for number in range(kept, 3):
        writer.append_trajectory(trajectory(number))
    writer.finish()
    assert_equal(open_store(path), data_of(0, 1, 2))
    verify_checksums(path)


def test_a_killed_writer_leaves_no_target_and_is_resumed(path):
    script = (
        "import sys, pathlib, itertools, numpy as np\n"
        "from genpol.data.store import DatasetWriter\n"
        "writer = DatasetWriter(pathlib.Path(sys.argv[1]))\n"
        "for number in itertools.count():\n"
        "    rows = np.full((501, 30), number)\n"
        "    writer.append_trajectory({'observation': rows, 'action': np.zeros((500, 2))})\n"
        "    if number == 5:\n"
        "        print('begun', flush=True)"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not path.exists()
    writer = DatasetWriter.resume(path)
    kept = writer.num_trajectories
    assert kept >= 6
    writer.finish()
    data = open_store(path)
    assert data.num_transitions == 500 * kept
    assert data.columns["observation"][:, 0].tolist() == np.repeat(np.arange(kept), 501).tolist()
    data.validate()
    verify_checksums(path)
