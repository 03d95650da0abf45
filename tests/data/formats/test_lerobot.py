"""LeRobot's frames: the rules for the ends of episodes, and files that must agree."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from genpol.data import formats
from genpol.errors import DatasetError


def test_a_solved_episode_keeps_its_last_step(lerobot_folder, lerobot_frames, load):
    path = lerobot_folder(lerobot_frames)
    data = load(path)
    assert formats.detect(path) == "lerobot"
    assert (data.ends - data.starts).tolist() == [3, 1, 4]
    observation = data.columns["observation"]
    given = lerobot_frames["observation.state"]
    assert np.array_equal(observation, given[[0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 8]])
    assert np.array_equal(data.columns["reward"][:3], lerobot_frames["next.reward"][:3])
    assert np.flatnonzero(data.columns["terminated"]).tolist() == [2, 9]
    assert np.flatnonzero(data.columns["success"]).tolist() == [2, 9]
    assert np.flatnonzero(data.truncated).tolist() == [4]
    assert (data.metadata["dropped_transitions"], data.metadata["repeated_states"]) == (1, 2)


def test_without_success_done_is_taken_at_its_word(lerobot_folder, lerobot_frames, load):
    del lerobot_frames["next.success"]
    data = load(lerobot_folder(lerobot_frames))
    assert (data.ends - data.starts).tolist() == [3, 2, 4]
    assert data.columns["terminated"].sum() == 3


def test_teleoperation_ends_where_the_recording_does(lerobot_folder, lerobot_frames, load):
    for name in ("next.done", "next.success", "next.reward"):
        del lerobot_frames[name]
    data = load(lerobot_folder(lerobot_frames))
    assert (data.ends - data.starts).tolist() == [2, 1, 3]
    assert np.array_equal(data.columns["observation"], lerobot_frames["observation.state"])
    assert {"terminated", "success", "reward"} & data.columns.keys() == set()


def test_an_episode_may_span_files(lerobot_folder, lerobot_frames, load):
    whole = load(lerobot_folder(lerobot_frames, split=5))
    other = lerobot_frames["observation.state"]
    assert np.array_equal(whole.columns["observation"][:3], other[:3])


@pytest.mark.parametrize("batch_bytes", [1, 300])
def test_batches_do_not_show(lerobot_folder, lerobot_frames, load, monkeypatch, batch_bytes):
    path = lerobot_folder(lerobot_frames, split=4)
    whole = load(path)
    monkeypatch.setattr("genpol.data.formats.lerobot._BATCH_BYTES", batch_bytes)
    pieces = load(path)
    assert pieces.ends.tolist() == whole.ends.tolist()
    for name, column in whole.columns.items():
        assert np.array_equal(pieces.columns[name], column), name


def test_other_numbers_are_carried_and_pictures_left_out(lerobot_folder, lerobot_frames, load):
    lerobot_frames["observation.environment_state"] = np.ones((9, 4), np.float32)
    extra = {
        "observation.environment_state": ("float32", [4]),
        "observation.images.top": ("video", [480, 640, 3]),
        "language": ("string", [1]),
    }
    data = load(lerobot_folder(lerobot_frames, extra=extra))
    assert data.columns["observation.environment_state"].shape == (11, 4)
    assert data.columns["timestamp"][:4].tolist() == pytest.approx([0, 0.1, 0.2, 0.2])
    assert data.metadata["skipped"] == ["observation.images.top", "language"]
    assert (data.metadata["fps"], data.metadata["robot_type"]) == (10, "so101")
    assert {"frame_index", "episode_index", "index"} & data.columns.keys() == set()


def test_lists_of_any_length_will_do_if_they_agree(lerobot_folder, lerobot_frames, load):
    """Files that pandas wrote have lists, not lists of fixed size."""
    lerobot_frames["action"] = lerobot_frames["action"].tolist()
    data = load(lerobot_folder(lerobot_frames))
    assert data.columns["action"].shape == (11, 2)


def with_row(values, row, value):
    changed = np.array(values)
    changed[row] = value
    return changed


@pytest.mark.parametrize(
    ("name", "row", "value", "expected"),
    [
        ("action", 7, 300.0, "file-001.parquet: action row 2: 300 is outside [-1, 1]"),
        ("action", 3, 300.0, "file-000.parquet: action row 3: 300 is outside [-1, 1]"),
        ("observation.state", 8, np.nan, "file-001.parquet: observation.state row 3: nan"),
        ("next.reward", 0, np.inf, "file-000.parquet: next.reward row 0: inf"),
        ("episode_index", 4, 2, "file-000.parquet: episode_index row 4: is 2, but by meta/epis"),
        ("frame_index", 6, 5, "file-001.parquet: frame_index row 1: is 5, but by meta/episodes"),
    ],
)
def test_refusals_name_file_and_row(
    lerobot_folder, lerobot_frames, refusal, name, row, value, expected
):
    lerobot_frames[name] = with_row(lerobot_frames[name], row, value)
    assert expected in refusal(lerobot_folder(lerobot_frames))


def test_an_empty_value_is_refused(lerobot_folder, lerobot_frames, refusal):
    lerobot_frames["next.reward"] = [None if i == 6 else 0.0 for i in range(9)]
    path = lerobot_folder(lerobot_frames)
    assert "file-001.parquet: next.reward row 1: is empty" in refusal(path)


def test_lists_of_different_lengths_are_refused(lerobot_folder, lerobot_frames, refusal):
    lists = lerobot_frames["action"].tolist()
    lists[6] = [0.0]
    path = lerobot_folder(lerobot_frames | {"action": lists})
    assert "file-001.parquet: action row 1: has 1 values, but meta/info.json says 2" in refusal(
        path
    )


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((3, 2, 3), "frame_index row 3: is beyond the 8 frames that meta/episodes counts"),
        ((3, 2, 5), "data: 9 frames, but meta/episodes counts 10"),
        ((3, 0, 6), "file-000.parquet: row 1: episode 1 of 0 frames"),
    ],
)
def test_frames_and_episodes_must_agree(lerobot_folder, lerobot_frames, refusal, lengths, expected):
    assert expected in refusal(lerobot_folder(lerobot_frames, lengths=lengths))


def test_a_feature_without_its_column_is_named(lerobot_folder, lerobot_frames, refusal):
    path = lerobot_folder(lerobot_frames, extra={"observation.effort": ("float32", [2])})
    assert "file-000.parquet: observation.effort: missing" in refusal(path)


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ({}, "feature observation.state is missing"),
        (
            {"observation.state": {"dtype": "image", "shape": [3, 8, 8]}},
            "feature observation.state is of a kind that is not read",
        ),
    ],
)
def test_vectors_are_needed(lerobot_folder, lerobot_frames, refusal, features, expected):
    assert expected in refusal(lerobot_folder(lerobot_frames, features=features))


def test_an_older_version_is_refused_with_what_to_do(lerobot_folder, lerobot_frames, refusal):
    path = lerobot_folder(lerobot_frames, codebase_version="v2.1")
    message = refusal(path)
    assert "codebase_version is v2.1, only v3 is read" in message
    assert "convert_dataset_v21_to_v30" in message


def test_missing_files_are_named(lerobot_folder, lerobot_frames, refusal):
    path = lerobot_folder(lerobot_frames)
    (path / "meta/episodes/chunk-000/file-000.parquet").unlink()
    assert "meta/episodes: no Parquet file in it" in refusal(path)


def test_a_file_without_its_end_is_named(lerobot_folder, lerobot_frames, refusal):
    path = lerobot_folder(lerobot_frames)
    file = path / "data/chunk-000/file-001.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    assert "file-001.parquet: damaged or cut short" in refusal(path)


def test_files_are_read_in_the_order_of_their_numbers(lerobot_folder, lerobot_frames, load):
    path = lerobot_folder(lerobot_frames)
    chunk = path / "data/chunk-000"
    (chunk / "file-000.parquet").rename(chunk / "file-999.parquet")
    (path / "data/chunk-001").mkdir()
    (chunk / "file-001.parquet").rename(path / "data/chunk-001/file-000.parquet")
    assert load(path).num_trajectories == 3


def test_info_that_is_no_json_is_refused(lerobot_folder, lerobot_frames, refusal):
    path = lerobot_folder(lerobot_frames)
    (path / "meta/info.json").write_text("{")
    assert "info.json: damaged, not valid JSON" in refusal(path)


def test_episodes_come_in_many_files(lerobot_folder, lerobot_frames, load):
    path = lerobot_folder(lerobot_frames)
    folder = path / "meta/episodes/chunk-000"
    table = pq.read_table(folder / "file-000.parquet")
    pq.write_table(table[:2], folder / "file-000.parquet")
    pq.write_table(table[2:], folder / "file-001.parquet")
    assert isinstance(table, pa.Table)
    assert load(path).num_trajectories == 3
    assert json.loads((path / "meta/info.json").read_text())["total_episodes"] == 3


@pytest.mark.parametrize("part", ["first", "last"])
@pytest.mark.parametrize("name", ["action", "next.reward"])
def test_damage_names_file_column_and_row_group(
    lerobot_folder, lerobot_frames, refusal, name, part
):
    file = lerobot_folder(lerobot_frames) / "data/chunk-000/file-001.parquet"
    table = pq.read_table(file)
    pq.write_table(table, file, row_group_size=2)  # two row groups
    group = 0 if part == "first" else 1
    metadata = pq.ParquetFile(file).metadata.row_group(group)
    columns = [metadata.column(i) for i in range(metadata.num_columns)]
    column = next(each for each in columns if each.path_in_schema.startswith(name))
    begin = column.dictionary_page_offset or column.data_page_offset
    content = bytearray(file.read_bytes())
    content[begin : begin + 6] = b"\xff" * 6
    file.write_bytes(content)
    message = refusal(file.parents[2])
    # Rows are read in batches, and the first one holds all that lie before the damage.
    place = rf"{name} row group {group}, from row {2 * group} on: damaged or cut short "
    assert message.startswith(f"{file}: {place}(")


# --- the range of actions ----------------------------------------------------------------------


@pytest.fixture
def degrees(lerobot_folder, lerobot_frames):
    """Return a data set whose actions are degrees and counts."""
    lerobot_frames["action"] = lerobot_frames["action"] * np.float32([90, 2048])
    return lerobot_folder(lerobot_frames)


def test_degrees_are_refused_with_what_to_do(degrees, refusal):
    message = refusal(degrees)
    assert "file-000.parquet: action row 0: " in message
    assert "with action_low= and action_high= of `genpol data convert`" in message


def test_the_range_of_actions_is_that_of_the_statistics(degrees):
    stats = {"action": {"min": [-90, 0], "max": [90, 4095], "mean": [0, 0]}}
    (degrees / "meta/stats.json").write_text(json.dumps(stats))
    found = formats.find_action_range(degrees)
    assert (found.low.tolist(), found.high.tolist()) == ([-90, 0], [90, 4095])


@pytest.mark.parametrize("stats", [None, {"timestamp": {"min": [0], "max": [1]}}])
def test_without_statistics_all_actions_are_read(degrees, lerobot_frames, stats):
    if stats is not None:
        (degrees / "meta/stats.json").write_text(json.dumps(stats))
    found = formats.find_action_range(degrees)
    steps = [0, 1, 2, 3, 5, 6, 7, 8]  # an unsolved episode loses its last
    actions = lerobot_frames["action"][steps].astype(np.float64)
    assert found.low.tolist() == actions.min(axis=0).tolist()
    assert found.high.tolist() == actions.max(axis=0).tolist()


@pytest.mark.parametrize("entry", [{"min": [0, 0]}, {"min": [1, 1], "max": [0, 0]}, [1], None])
def test_statistics_that_are_none_are_refused(degrees, entry):
    (degrees / "meta/stats.json").write_text(json.dumps({"action": entry}))
    with pytest.raises(DatasetError, match=r"stats\.json: action: has no min and max of each dim"):
        formats.find_action_range(degrees)
