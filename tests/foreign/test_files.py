"""Files of others are opened without running anything that is in them."""

from __future__ import annotations

import os
import pickle

import pytest
import torch

from genpol import foreign
from genpol.errors import CheckpointError, ConfigError
from genpol.foreign import ImportOptions


class Bomb:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("form", ["dppo", "reinflow", "robomimic"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_pickle_is_not_run(tmp_path, form, how):
    file, target = tmp_path / "x.pt", tmp_path / "ran"
    if how == "torch":
        torch.save({"model": Bomb(target)}, file)
    else:
        file.write_bytes(pickle.dumps({"model": Bomb(target)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"not opened; .*save it anew") as caught:
        foreign.read(form, file, ImportOptions())
    assert "\n" not in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 half of a zip", b"\x80\x02}"])
def test_a_damaged_file_is_refused(tmp_path, content):
    file = tmp_path / "x.pt"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.pt: is no file of torch\.save") as caught:
        foreign.read("dppo", file, ImportOptions())
    assert "\n" not in str(caught.value)


def test_a_file_of_another_thing_is_refused(tmp_path):
    torch.save(torch.zeros(3), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds a Tensor, not a dictionary"):
        foreign.read("robomimic", tmp_path / "x.pt", ImportOptions())
    with pytest.raises(CheckpointError, match=r"no such folder; name that of config\.json"):
        foreign.read("lerobot", tmp_path / "x.pt", ImportOptions())
    with pytest.raises(CheckpointError, match="is a folder; name the file in it"):
        foreign.read("dppo", tmp_path, ImportOptions())
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        foreign.read("lerobot", tmp_path, ImportOptions())


def test_statistics_with_pickles_are_refused(layouts, tmp_path):
    import numpy as np

    run = layouts.dppo()
    path, file = run.write(), tmp_path / "bad.npz"
    np.savez(file, obs_min=np.array([Bomb(tmp_path / "ran")], dtype=object))
    with pytest.raises(CheckpointError, match=r"bad\.npz: cannot be read"):
        foreign.read("dppo", path, ImportOptions(normalization=file))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", ["a: [", "- 1"])
def test_settings_that_are_none_are_refused(layouts, tmp_path, text):
    path, file = layouts.dppo().write(), tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(
        CheckpointError, match=r"bad\.yaml: (is no YAML|holds no settings)"
    ) as caught:
        foreign.read("dppo", path, ImportOptions(config=file))
    assert "\n" not in str(caught.value)


def test_an_unknown_format_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="format = 'act'"):
        foreign.read("act", tmp_path, ImportOptions())
