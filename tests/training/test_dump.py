"""Dumps of an update that went wrong."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict

from genpol.errors import CheckpointError
from genpol.training import checkpoint, dump


def test_dump_gives_back_the_batch_and_its_nan(tmp_path):
    batch = TensorDict({"observation": torch.tensor([[1.0, math.nan]])}, [1])
    path = dump.write_dump(tmp_path / "dump-7", {"batch": batch, "metrics": {"loss": math.inf}})
    state = dump.read_dump(path)
    assert torch.isnan(state["batch"]["observation"]).tolist() == [[False, True]]
    assert state["metrics"] == {"loss": math.inf}


def test_nothing_resumes_from_a_dump(tmp_path):
    path = dump.write_dump(tmp_path / "dump-7", {"batch": {}})
    with pytest.raises(CheckpointError, match=r"format is 'genpol\.dump'"):
        checkpoint.load(path)


def test_a_checkpoint_is_no_dump(tmp_path):
    path = checkpoint.save(tmp_path, "step-1", {}, metadata={})
    with pytest.raises(CheckpointError, match=r"format is 'genpol\.checkpoint'"):
        dump.read_dump(path)
