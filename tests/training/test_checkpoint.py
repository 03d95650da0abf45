"""What a checkpoint gives back, which ones are kept, and which one a path means."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor

from genpol.errors import CheckpointError
from genpol.training import checkpoint

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
]


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Durability is tested among the contracts."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def save(folder, name="step-1", state=None, **options):
    return checkpoint.save(folder, name, state or {}, metadata={}, **options)


def round_trip(folder, state):
    return checkpoint.load(save(folder, state=state))


def identical(a, b):
    """Equal in type, shape and every bit; all NaN are one."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        bits = [t.contiguous().flatten().view(torch.uint8) for t in (a, b)]
        return same_kind and torch.equal(*bits)
    if isinstance(a, dict):
        return [*a] == [*b] and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(identical, a, b))
    if isinstance(a, float | np.floating):
        both_nan = math.isnan(a) and math.isnan(b)
        return both_nan or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = math.prod(shape)
    if dtype is torch.bool:
        return torch.tensor(
            draw(st.lists(st.booleans(), min_size=count, max_size=count)), dtype=dtype
        ).reshape(shape)
    size = torch.empty(0, dtype=dtype).element_size() * count
    data = bytearray(draw(st.binary(min_size=size, max_size=size)))
    flat = torch.frombuffer(data, dtype=dtype) if size else torch.empty(0, dtype=dtype)
    return flat.reshape(shape)


KEYS = st.one_of(
    st.text(max_size=6), st.integers(), st.sampled_from(["$tensor", "$dict", "__metadata__", "a/b"])
)
LEAVES = st.one_of(
    tensors(),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.floats(width=32).map(np.float32),
    st.integers(-(2**63), 2**63 - 1).map(np.int64),
    st.booleans().map(np.bool_),
)
STATES = st.dictionaries(
    KEYS,
    st.recursive(
        LEAVES,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.lists(inner, max_size=3).map(tuple),
            st.dictionaries(KEYS, inner, max_size=3),
        ),
        max_leaves=8,
    ),
    max_size=4,
)


@settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(state=STATES)
def test_any_state_comes_back_identical(tmp_path, state):
    assert identical(round_trip(tmp_path, state), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
def test_tensor_keeps_dtype_shape_and_bits(tmp_path, dtype, shape):
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    assert identical(round_trip(tmp_path, {"x": tensor}), {"x": tensor})


@pytest.mark.parametrize(
    "number",
    [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan, 2**200, -1, True],
    ids=repr,
)
def test_number_is_exact(tmp_path, number):
    assert identical(round_trip(tmp_path, {"x": number}), {"x": number})


def test_integer_and_string_keys_that_look_alike_stay_apart(tmp_path):
    state = {0: torch.zeros(1), "0": torch.ones(1), "x": {1: "a", "1": "b"}}
    assert identical(round_trip(tmp_path, state), state)


def test_keys_with_slashes_do_not_collide_with_nested_ones(tmp_path):
    state = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    assert identical(round_trip(tmp_path, state), state)


def test_views_of_one_memory_come_back_with_their_own_values(tmp_path):
    base = torch.arange(12.0)
    state = {"base": base, "part": base[2:5], "turned": base.view(3, 4).t(), "again": base}
    loaded = round_trip(tmp_path, state)
    assert identical(loaded, state)
    loaded["base"].zero_()
    assert torch.equal(loaded["part"], torch.tensor([2.0, 3.0, 4.0]))


def test_loaded_tensors_are_aligned_like_fresh_ones(tmp_path):
    # Otherwise vectorised sums start elsewhere and round differently after a resume.
    state = {"flag": torch.tensor([True]), "x": torch.ones(5), "y": torch.ones(7)}
    loaded = round_trip(tmp_path, state)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in loaded.values())


def test_parameters_and_module_state_are_accepted(tmp_path):
    module = torch.nn.Linear(3, 2)
    other = torch.nn.Linear(3, 2)
    other.load_state_dict(round_trip(tmp_path, {"module": module.state_dict()})["module"])
    assert torch.equal(other.weight, module.weight)


def test_tensordict_comes_back_as_nested_dictionaries(tmp_path):
    batch = TensorDict({"next": {"reward": torch.ones(2, 1)}}, [2])
    loaded = round_trip(tmp_path, {"batch": batch})
    assert identical(loaded, {"batch": {"next": {"reward": torch.ones(2, 1)}}})


@pytest.mark.parametrize(
    ("value", "place"),
    [
        (object(), "agent/bad"),
        ({1, 2}, "agent/bad"),
        (np.zeros(2), "agent/bad"),
        (torch.zeros(1, dtype=torch.complex128), "agent/bad"),
        (torch.eye(2).to_sparse(), "agent/bad"),
        ([1, {"deep": object()}], "agent/bad/1/deep"),
        ({(1, 2): 0}, "agent/bad"),
    ],
    ids=["object", "set", "array", "complex128", "sparse", "nested", "tuple key"],
)
def test_what_cannot_be_saved_is_refused_by_its_place(tmp_path, value, place):
    with pytest.raises(CheckpointError, match=f"^{place}: "):
        save(tmp_path / "new", state={"agent": {"bad": value}})
    assert not (tmp_path / "new").exists()


def test_metadata_is_read_without_the_state(tmp_path):
    metadata = {"env_steps": 12, "return": math.nan, "agent": "gorl", "rate": 0.1}
    path = checkpoint.save(tmp_path, "step-1", {"x": torch.zeros(2)}, metadata=metadata)
    (path / checkpoint.TENSORS).unlink()
    assert identical(checkpoint.read_metadata(path), metadata)


def test_only_the_last_ones_are_kept(tmp_path):
    for steps in range(1, 6):
        save(tmp_path, checkpoint.step_name(steps), keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        "step-000000000004",
        "step-000000000005",
    ]


def test_the_new_one_is_kept_even_if_it_sorts_first(tmp_path):
    save(tmp_path, "step-8", keep=1)
    path = save(tmp_path, "step-3", keep=1)
    assert list(tmp_path.iterdir()) == [path]


def test_folders_that_are_no_checkpoints_are_never_removed(tmp_path):
    (tmp_path / "notes").mkdir()
    for steps in range(3):
        save(tmp_path, checkpoint.step_name(steps), keep=1)
    assert (tmp_path / "notes").is_dir()


def test_an_equal_name_replaces(tmp_path):
    save(tmp_path, "step-1", {"x": 1})
    path = save(tmp_path, "step-1", {"x": 2})
    assert checkpoint.load(path) == {"x": 2}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["", ".tmp-x", "a/b", ".."])
def test_a_name_that_is_no_plain_folder_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="name = "):
        save(tmp_path, name)


def test_latest_ignores_staging_and_other_folders(tmp_path):
    path = save(tmp_path, "step-1")
    for stray in (".tmp-step-2", "step-3"):
        (tmp_path / stray).mkdir()
    (tmp_path / ".tmp-step-2" / checkpoint.MANIFEST).write_text("{}")
    assert checkpoint.latest(tmp_path) == path


def test_latest_of_nothing_is_none(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None


def test_discard_after_removes_the_abandoned_future_only(tmp_path):
    first, second, _ = (save(tmp_path, f"step-{steps}") for steps in (1, 2, 3))
    checkpoint.discard_after(second)
    assert sorted(tmp_path.iterdir()) == [first, second]


def test_resolve_takes_a_run_a_folder_of_checkpoints_or_one_of_them(tmp_path):
    folder = tmp_path / "checkpoints"
    first, last = save(folder, "step-1"), save(folder, "step-2")
    assert [checkpoint.resolve(p) for p in (tmp_path, folder, first)] == [last, last, first]


def test_resolve_names_the_nearest_folder(tmp_path):
    (tmp_path / "20260101-s0").mkdir()
    with pytest.raises(CheckpointError, match="Did you mean '20260101-s0'"):
        checkpoint.resolve(tmp_path / "20260101-s1")


def test_resolve_of_a_folder_without_checkpoints_says_what_to_give(tmp_path):
    with pytest.raises(CheckpointError, match="give a run folder"):
        checkpoint.resolve(tmp_path)


def test_loading_changes_nothing(tmp_path):
    path = save(tmp_path, state={"x": torch.zeros(3)})

    def picture() -> dict[Path, int]:
        return {entry: entry.stat().st_mtime_ns for entry in [path, *path.iterdir(), tmp_path]}

    before = picture()
    checkpoint.load(path)
    assert picture() == before
