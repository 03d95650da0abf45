"""`genpol data`: what it says of a data set, and one line on what is wrong."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from genpol.cli import data as command
from genpol.cli.main import main
from genpol.data.dataset import OfflineDataset
from genpol.data.formats import open_dataset, write
from genpol.data.store import open_store
from genpol.errors import ConfigError
from genpol.training.settings import CheckpointSettings


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GENPOL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path):
    trajectories = [
        {
            "observation": np.arange(num_steps + 1.0)[:, None] * [1.0, -1.0],
            "action": np.full((num_steps, 1), 0.5),
            "reward": np.ones(num_steps),
            "success": np.arange(num_steps) == 1,
        }
        for num_steps in (1, 3)
    ]
    path = tmp_path / "store"
    write(OfflineDataset.from_trajectories(trajectories, {"env": "toy", "format": "d4rl"}), path)
    return path


@pytest.fixture
def npz(tmp_path, store):
    write(open_store(store), tmp_path / "data.npz", "ogbench")
    return tmp_path / "data.npz"


def error(capsys, *arguments, code=2):
    """Return the one line that a command prints when it fails."""
    assert main(["data", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("genpol: error: ").rstrip("\n")


def test_info_as_json_is_what_the_data_set_knows(store, capsys):
    assert main(["data", "info", str(store), "json=true"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["path"] == str(store)
    assert (facts["format"], facts["metadata"]["env"]) == ("genpol", "toy")
    assert (facts["num_trajectories"], facts["num_transitions"]) == (2, 4)
    assert facts["return"] == {"min": 1, "mean": 2, "std": 1, "max": 3}
    assert facts["disk_bytes"] == sum(file.stat().st_size for file in store.iterdir())


def test_info_is_a_table_that_a_pipe_does_not_cut(store, capsys):
    assert main(["data", "info", str(store)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"path {store}" in lines
    assert "format genpol, converted from d4rl" in lines
    assert "environment toy" in lines
    assert "transitions 4" in lines
    assert "length 2 ± 1, from 1 to 3" in lines
    assert "return 2 ± 1, from 1 to 3" in lines
    assert "success rate 50.0% of trajectories" in lines
    assert "terminated not recorded" in lines
    assert "observation float32 2 -3 3" in lines
    assert "action float32 1 0.5 0.5" in lines


def test_info_of_another_format_is_made_from_the_cache(npz, tmp_path, capsys):
    assert main(["data", "info", str(npz), "json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "ogbench"
    assert len(list((tmp_path / "cache/datasets").iterdir())) == 1


def test_a_valid_data_set_is_said_to_be_valid(store, npz, tmp_path, capsys):
    for path, name in ((store, "genpol"), (npz, "ogbench")):
        assert main(["data", "validate", str(path)]) == 0
        expected = f"{path}: valid ({name}, 2 trajectories, 4 transitions)\n"
        assert capsys.readouterr().out == expected
    assert not (tmp_path / "cache").exists()


def test_an_invalid_value_is_named(tmp_path, npz, capsys):
    arrays = dict(np.load(npz))
    arrays["actions"][3] = 7
    np.savez(tmp_path / "bad.npz", **arrays)
    message = error(capsys, "validate", tmp_path / "bad.npz", code=1)
    assert message.startswith(f"{tmp_path / 'bad.npz'}: actions row 3: 7 is outside [-1, 1]; ")


@pytest.mark.parametrize(
    ("target", "options", "name"),
    [
        ("copy", [], "genpol"),
        ("a.npz", ["format=ogbench"], "ogbench"),
        ("a-v0", ["format=minari"], "minari"),
    ],
)
def test_a_data_set_is_converted(npz, tmp_path, capsys, target, options, name):
    assert main(["data", "convert", str(npz), str(tmp_path / target), *options]) == 0
    assert capsys.readouterr().out == f"{tmp_path / target}\n"
    assert main(["data", "info", str(tmp_path / target), "json=true"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["format"], facts["num_transitions"]) == (name, 4)


def test_conversion_to_a_store_needs_no_cache(npz, tmp_path):
    assert main(["data", "convert", str(npz), str(tmp_path / "copy")]) == 0
    assert not (tmp_path / "cache").exists()


def test_nothing_is_overwritten(npz, store, capsys):
    message = error(capsys, "convert", npz, store, code=1)
    assert message == f"{store}: exists; nothing is overwritten, choose another name"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "nothing to do; write `genpol data` and one of info, validate, convert"),
        (["inof"], "unknown action 'inof'. Did you mean 'info'? The actions are info"),
        (
            ["info"],
            "`genpol data info` takes PATH, and was given 0 paths; see `genpol data info --help`",
        ),
        (["info", "a", "b"], "`genpol data info` takes PATH, and was given 2 paths"),
        (
            ["info", "a", "jsn=true"],
            "unknown option 'jsn' of `genpol data info`. Did you mean 'jso",
        ),
        (["info", "a", "json=yes"], "json = 'yes': must be true or false"),
        (["validate", "a", "json=true"], "Beside PATH, it takes none"),
        (["convert", "a"], "`genpol data convert` takes SRC DST, and was given 1 paths"),
        (["convert", "a", "b", "format=minary"], "'minary': is no format; must be one of genpol"),
        (["convert", "a", "b", "format=d4rl"], "'d4rl': is only read, not written; must be one of"),
        (
            ["convert", "a", "b", "action_low=-1"],
            "action_low is given alone: action_low and action",
        ),
        (["convert", "a", "b", "action_high=1"], "action_high is given alone"),
        (
            ["convert", "a", "b", "action_low=1", "action_high=x"],
            "action_high = 'x': must be a num",
        ),
        (
            ["convert", "a", "b", "action_low=,1", "action_high=2"],
            "action_low = ',1': must be a nu",
        ),
        (
            ["convert", "a", "b", "action_low=nan", "action_high=2"],
            "action_low = 'nan': must be a n",
        ),
        (["convert", "a", "b", "action_low=-inf", "action_high=2"], "action_low = '-inf': must be"),
        (
            ["convert", "a", "b", "action_low=1,2,3", "action_high=4,5"],
            "action_low has 3 numbers, action_high 2: give one for each dimension, or one for all",
        ),
        (
            ["convert", "a", "b", "action_low=1,7", "action_high=5"],
            "action_low = 7: must not be above action_high 5",
        ),
        (["convert", "a", "b", "action_scale=file"], "action_scale = 'file': must be data"),
        (
            ["convert", "a", "b", "action_scale=data", "action_low=1", "action_high=2"],
            "action_scale= and action_low= exclude each other: keep one",
        ),
    ],
)
def test_a_wrong_command_is_told_in_one_line(capsys, arguments, expected):
    assert expected in error(capsys, *arguments)


# --- actions in other units --------------------------------------------------------------------


@pytest.fixture
def degrees(npz, tmp_path):
    """Return a file whose actions are degrees of one joint and counts of another."""
    arrays = dict(np.load(npz))
    arrays["actions"] = np.array([[45, 0], [7, 7], [-90, 1024], [90, 4096], [0, 2048], [7, 7]])
    np.savez(tmp_path / "degrees.npz", **arrays)
    return tmp_path / "degrees.npz"


def actions(path):
    data = open_dataset(path)
    return data.columns["action"][data.transition_row(np.arange(data.num_transitions))].tolist()


SCALED = [[0.5, -1], [-1, -0.5], [1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("target", "options"),
    [("copy", []), ("a.npz", ["format=ogbench"]), ("a-v0", ["format=minari"])],
)
def test_actions_are_scaled_to_the_range_of_every_environment(
    degrees, tmp_path, capsys, target, options
):
    path = tmp_path / target
    bounds = ["action_low=-90,0", "action_high=90,4096"]
    assert main(["data", "convert", str(degrees), str(path), *bounds, *options]) == 0
    assert actions(path) == SCALED
    capsys.readouterr()
    assert main(["data", "info", str(path)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "action 2 numbers, scaled from [-90, 90] [0, 4096]" in lines


def test_the_range_is_that_of_the_data(degrees, tmp_path, capsys):
    path = tmp_path / "copy"
    assert main(["data", "convert", str(degrees), str(path), "action_scale=data"]) == 0
    assert actions(path) == SCALED
    assert main(["data", "info", str(path), "json=true"]) == 0
    metadata = json.loads(capsys.readouterr().out.partition("\n")[2])["metadata"]
    assert (metadata["action_low"], metadata["action_high"]) == ([-90, 0], [90, 4096])


def test_a_dimension_that_never_changes_becomes_zero(degrees, tmp_path):
    arrays = dict(np.load(degrees))
    arrays["actions"][:, 1] = 300
    np.savez(tmp_path / "still.npz", **arrays)
    path = tmp_path / "copy"
    assert (
        main(["data", "convert", str(tmp_path / "still.npz"), str(path), "action_scale=data"]) == 0
    )
    assert actions(path) == [[0.5, 0], [-1, 0], [1, 0], [0, 0]]


def test_one_number_is_for_all_dimensions(npz, tmp_path, capsys):
    path = tmp_path / "copy"
    assert main(["data", "convert", str(npz), str(path), "action_low=0", "action_high=2"]) == 0
    assert actions(path) == [[-0.5]] * 4
    capsys.readouterr()
    assert main(["data", "info", str(path)]) == 0
    assert "1 numbers, scaled from [0, 2] " in capsys.readouterr().out


def test_a_refusal_names_the_option_and_leaves_nothing(degrees, tmp_path, capsys):
    message = error(capsys, "convert", degrees, tmp_path / "copy", code=1)
    assert (
        "actions: holds int64, codes of discrete actions, which are not read; if they are"
        in message
    )
    bounds = ["action_low=-90,0", "action_high=90,1000"]
    for name, target in (("genpol", "copy"), ("minari", "copy-v0")):
        command = ["convert", degrees, tmp_path / target, f"format={name}", *bounds]
        message = error(capsys, *command, code=1)
        assert "actions row 2: 1024 is outside [0, 1000], the range of dimension 1; give" in message
        assert not list(tmp_path.glob("*copy*"))


def test_a_range_of_another_width_is_told(degrees, tmp_path, capsys):
    command = ["convert", degrees, tmp_path / "copy", "action_low=0,0,0", "action_high=1"]
    message = error(capsys, *command, code=1)
    assert "actions: is of width 2, but its range is given by 3 numbers" in message


def test_a_target_is_refused_before_the_range_is_looked_for(degrees, capsys, monkeypatch):
    monkeypatch.setattr("genpol.data.formats.find_action_range", None)
    message = error(capsys, "convert", degrees, degrees, "action_scale=data", code=1)
    assert message == f"{degrees}: exists; nothing is overwritten, choose another name"


# --- held actions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, ""),
        ({"action_repeat": 2}, ""),
        (
            {"action_repeat": 1},
            "warning: d: its actions are held for 1 steps, those of the environment for 2; set "
            "env.action_repeat=1\n",
        ),
    ],
)
def test_actions_that_were_held_for_another_time_are_told(store, capsys, metadata, expected):
    data = open_store(store)
    data.metadata.update(metadata)
    command.warn_of_action_repeat(data, "d", 2)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", expected)


# --- the rest ----------------------------------------------------------------------------------


def test_a_missing_file_is_told(tmp_path, capsys):
    assert "a.npz: no such file or folder." in error(capsys, "info", tmp_path / "a.npz", code=1)


def test_a_path_may_hold_an_equals_sign(tmp_path, store, monkeypatch, capsys):
    store.rename(tmp_path / "a=b")
    monkeypatch.chdir(tmp_path)
    assert main(["data", "validate", "./a=b"]) == 0
    with pytest.raises(ConfigError, match="unknown option 'a'"):
        command.run(["validate", "a=b"])


def test_every_action_is_explained():
    assert all(f"genpol data {action} " in command.USAGE for action in command.ACTIONS)


@pytest.mark.parametrize("action", command.ACTIONS)
@pytest.mark.parametrize("ask", [["data", "ACTION", "--help"], ["help", "data", "ACTION"]])
def test_every_action_has_its_own_help(capsys, action, ask):
    assert main([action if word == "ACTION" else word for word in ask]) == 0
    usage = capsys.readouterr().out
    assert usage.startswith(f"usage: genpol data {action} ")
    assert "example" in usage
    others = [f"usage: genpol data {other} " for other in command.ACTIONS if other != action]
    assert not any(other in usage for other in others)
    options = re.findall(r"\[(\w+)=", usage.partition("\n\n")[0])
    explained = usage.partition("\n\n")[2]
    assert all(option in explained for option in options if option != "key")


@pytest.mark.parametrize("ask", [["data", "--help"], ["help", "data"], ["data", "inof", "-h"]])
def test_without_an_action_the_help_is_that_of_all(capsys, ask):
    assert main(ask) == 0
    assert capsys.readouterr().out == command.USAGE.strip() + "\n"


def test_help_on_records_says_how_to_get_a_medium_checkpoint(capsys):
    assert main(["data", "record", "--help"]) == 0
    usage = capsys.readouterr().out
    assert "checkpoint.interval_steps=500000 checkpoint.keep=1000" in usage
    with pytest.raises(ConfigError, match=r"checkpoint\.keep"):
        CheckpointSettings(keep=0)  # there is no value for all


def test_arguments_are_checked_before_anything_is_imported():
    import subprocess
    import sys

    script = (
        "import sys; from genpol.cli.main import main; code = main(['data', 'convert', 'a']);"
        "sys.exit(code if not {'numpy', 'torch', 'h5py'} & set(sys.modules) else 7)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert result.returncode == 2


def test_sizes_are_read_by_people():
    assert [command._size(size) for size in (12, 2048, 3.5 * 2**30)] == [
        "12 bytes",
        "2.0 KiB",
        "3.5 GiB",
    ]
