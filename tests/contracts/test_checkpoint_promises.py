"""The promises of checkpoints: whole or absent, no damage unseen, no pickles, exact resume."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from genpol.errors import CheckpointError
from genpol.nn.optimizer import GuardedOptimizer
from genpol.training import checkpoint

FILES = (checkpoint.MANIFEST, checkpoint.STATE, checkpoint.TENSORS)
STATE = {"agent": {"weight": torch.arange(6.0)}, "steps": 7, "rate": 0.1}
GOLDEN = Path(__file__).parent / "data" / "checkpoint-v1"


def save(folder, name="step-2", state=STATE, **options):
    return checkpoint.save(folder, name, state, metadata={"env_steps": 7}, **options)


def is_whole(path):
    loaded = checkpoint.load(path)
    return torch.equal(loaded["agent"]["weight"], STATE["agent"]["weight"])


def refusal(path):
    """Return the one line with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_seen(tmp_path, name):
    path = save(tmp_path)
    original = (path / name).read_bytes()
    for position in range(0, len(original), 3):
        damaged = bytearray(original)
        damaged[position] ^= 1 << position % 8
        (path / name).write_bytes(damaged)
        if name == checkpoint.MANIFEST and _same_json(damaged, original):
            continue  # a newline turned into a blank between two tokens harms nobody
        assert name in refusal(path)


def _same_json(a, b):
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0, 0.5, -1], ids=["empty", "half", "one byte short"])
def test_a_truncated_file_is_named(tmp_path, name, left):
    path = save(tmp_path)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: int(left * len(data)) if left >= 0 else -1])
    assert f"{path / name}: damaged" in refusal(path)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    path = save(tmp_path)
    (path / name).unlink()
    assert f"{path / name}: missing" in refusal(path)


def test_an_extra_file_is_named(tmp_path):
    path = save(tmp_path)
    (path / "extra.bin").write_bytes(b"x")
    assert f"{path / 'extra.bin'}: not listed" in refusal(path)


def test_a_folder_without_manifest_is_foreign(tmp_path):
    assert f"is no {checkpoint.FORMAT}" in refusal(tmp_path)


def test_a_manifest_of_something_else_is_foreign(tmp_path):
    (tmp_path / checkpoint.MANIFEST).write_text('{"format": "other"}')
    assert "its format is 'other'" in refusal(tmp_path)


def test_a_newer_format_asks_for_an_upgrade(tmp_path, monkeypatch):
    with monkeypatch.context() as future:
        future.setattr(checkpoint, "FORMAT_VERSION", checkpoint.FORMAT_VERSION + 1)
        path = save(tmp_path)
    assert "pip install --upgrade genpol" in refusal(path)


def test_a_refusal_names_the_newest_older_intact_checkpoint(tmp_path):
    first, second, third, fourth = (save(tmp_path, f"step-{i}", keep=9) for i in (1, 2, 3, 4))
    for path in (second, third):
        (path / checkpoint.STATE).write_text("{}")
    assert refusal(third).endswith(f"resume from {first} instead")
    assert is_whole(fourth)


def test_a_refusal_says_so_if_there_is_no_other(tmp_path):
    path = save(tmp_path)
    (path / checkpoint.STATE).unlink()
    assert refusal(path).endswith("no older intact one lies beside it")


# --- disks -------------------------------------------------------------------------------------

STEPS_OF_A_SAVE = ("mkdir", "write_text", "fsync", "rename")


def _fail(monkeypatch, step, code):
    """Make one kind of system call fail."""

    def fails(*_args, **_options):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os if step == "fsync" else Path, step, fails)


@pytest.mark.parametrize("step", STEPS_OF_A_SAVE)
@pytest.mark.parametrize("replace", [False, True], ids=["new", "replacing"])
def test_a_full_disk_leaves_the_previous_checkpoint_and_nothing_else(
    tmp_path, monkeypatch, step, replace
):
    previous = save(tmp_path, "step-1")
    with monkeypatch.context() as disk:
        _fail(disk, step, errno.ENOSPC)
        with pytest.raises(CheckpointError, match=r"No space left on device.*free some disk") as e:
            save(tmp_path, "step-1" if replace else "step-2", keep=1)
    assert str(previous) in str(e.value)
    assert list(tmp_path.iterdir()) == [previous]
    assert is_whole(previous)


def test_a_replacement_that_fails_halfway_puts_the_old_one_back(tmp_path, monkeypatch):
    path = save(tmp_path, "step-1")
    real = Path.rename

    def fails_from_staging(self, target):
        if self.name == f"{checkpoint.STAGING}step-1":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fails_from_staging)
    with pytest.raises(CheckpointError, match="cannot be saved"):
        save(tmp_path, "step-1")
    assert list(tmp_path.iterdir()) == [path]
    assert is_whole(path)


def test_a_disk_that_fills_up_within_the_tensors_is_reported(tmp_path):
    previous = save(tmp_path, "step-1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    try:
        with pytest.raises(CheckpointError, match=r"File too large.*free some disk"):
            save(tmp_path, state={"x": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [previous]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES], ids=errno.errorcode.get)
def test_a_read_only_folder_is_reported(tmp_path, monkeypatch, code):
    # Simulated, because the superuser may write anywhere.
    previous = save(tmp_path, "step-1")
    _fail(monkeypatch, "mkdir", code)
    with pytest.raises(CheckpointError, match="make the folder writable"):
        save(tmp_path)
    assert list(tmp_path.iterdir()) == [previous]


def test_a_file_in_the_place_of_the_folder_is_reported(tmp_path):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="cannot be saved"):
        save(tmp_path / "checkpoints")


def test_older_checkpoints_are_removed_only_after_the_new_one_is_durable(tmp_path, monkeypatch):
    save(tmp_path, "step-1")
    seen = []
    real = os.fsync

    def watch(descriptor):
        seen.append({path.name for path in tmp_path.iterdir()})
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    save(tmp_path, "step-2", keep=1)
    assert seen[-1] == {"step-1", "step-2"}  # flushing the folder is the last flush
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


# --- kills -------------------------------------------------------------------------------------


def _save_and_die(folder, step, call):
    """Save in a child process that is killed at the ``call``-th call of ``step``; return if it was.

    A fork, because importing torch anew for every point of death would take minutes.
    """
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)
    try:
        place = os if step in ("fsync", "unlink") else Path
        real, count = getattr(place, step), 0

        def lethal(*args, **options):
            nonlocal count
            count += 1
            if count == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        setattr(place, step, lethal)
        save(folder, "step-2", keep=1)
    finally:
        os._exit(0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.parametrize("step", [*STEPS_OF_A_SAVE, "unlink"])
def test_a_kill_at_any_point_leaves_whole_ones_only_and_the_next_save_cleans_up(tmp_path, step):
    call, killed = 0, True
    while killed:
        call += 1
        folder = tmp_path / str(call)
        save(folder, "step-1")
        killed = _save_and_die(folder, step, call)
        visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
        assert visible
        assert all(is_whole(path) for path in visible)
        save(folder, "step-3", keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-3"]
    assert call > 1


# --- format ------------------------------------------------------------------------------------


def test_a_checkpoint_of_the_first_format_still_loads():
    """Never write ``data/checkpoint-v1`` anew: it stands for the files that users have."""
    state = checkpoint.load(GOLDEN)
    assert torch.equal(state["agent"]["weight"], torch.arange(6.0))
    assert state["optimizer"][0]["step"].dtype is torch.bfloat16
    assert state["betas"] == (0.9, 0.999)
    assert checkpoint.read_metadata(GOLDEN) == {"env_steps": 7}


def test_all_files_are_readable_by_whom_the_umask_lets_read(tmp_path):
    path = save(tmp_path)
    assert len({(path / name).stat().st_mode for name in FILES}) == 1


def test_only_safetensors_and_json_are_written(tmp_path):
    path = save(tmp_path)
    assert sorted(entry.name for entry in path.iterdir()) == sorted(FILES)
    json.loads((path / checkpoint.STATE).read_text(), parse_constant=pytest.fail)


# --- exact resume ------------------------------------------------------------------------------


def _model(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 3))
    return model, GuardedOptimizer(model.parameters(), 1e-2, max_grad_norm=0.5, eps=1e-5)


def _train(model, optimizer, generator, updates):
    for _ in range(updates):
        batch = torch.randn(64, 5, generator=generator)
        optimizer.step(model(batch).square().mean())


def test_training_goes_on_to_the_bit_after_a_round_trip(tmp_path):
    model, optimizer = _model(seed=0)
    generator = torch.Generator().manual_seed(1)
    _train(model, optimizer, generator, 5)
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
    }
    path = save(tmp_path, state=state)
    _train(model, optimizer, generator, 20)

    resumed, resumed_optimizer = _model(seed=2)
    loaded = checkpoint.load(path)
    resumed.load_state_dict(loaded["model"])
    resumed_optimizer.load_state_dict(loaded["optimizer"])
    resumed_generator = torch.Generator()
    resumed_generator.set_state(loaded["generator"])
    _train(resumed, resumed_optimizer, resumed_generator, 20)
    pairs = zip(model.parameters(), resumed.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
