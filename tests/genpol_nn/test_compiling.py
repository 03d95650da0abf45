"""Functions compiled where that works."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch

from genpol.nn import compiling
from genpol.nn.compiling import compiled


def fake(monkeypatch, compile):
    monkeypatch.setattr(compiling.torch, "compile", lambda function, **options: compile(function))


def test_the_compiled_function_is_called_from_the_first_call_on(monkeypatch):
    calls = []
    fake(monkeypatch, lambda function: lambda x: calls.append(x) or function(x))
    run = compiled(lambda x: x + 1, name="agent.compile")
    assert [run(1), run(2)] == [2, 3]
    assert calls == [1, 2]


def test_where_the_compiler_fails_the_function_runs_with_one_warning(monkeypatch):
    def broken(x):
        raise RuntimeError("\n  no C++ compiler found\nmore")

    fake(monkeypatch, lambda function: broken)
    run = compiled(lambda x: x + 1, name="agent.compile")
    with pytest.warns(
        UserWarning, match="agent.compile = True: .* no C\\+\\+ compiler found"
    ) as told:
        assert run(1) == 2
    assert len(told) == 1
    assert "\n" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run(2) == 3


def test_what_cuda_graphs_return_outlives_the_next_call(monkeypatch):
    class Two(NamedTuple):
        first: torch.Tensor
        second: None

    options = {}
    buffer = torch.zeros(2)

    def record(function, **given):
        options.update(given)
        return lambda x: Two(buffer.add_(x), None)

    monkeypatch.setattr(compiling.torch, "compile", record)
    run = compiled(lambda x: x, name="agent.compile", graphs=True)
    found = [run(1.0), run(2.0)]
    assert [x.first.tolist() for x in found] == [[1, 1], [3, 3]]
    assert all(isinstance(x, Two) for x in found)
    assert options["mode"] == "reduce-overhead"
    compiled(lambda x: x, name="agent.compile")
    assert options["mode"] is None


def test_what_the_function_raises_is_raised():
    def wrong(x):
        raise KeyError("its own fault")

    run = compiled(wrong, name="agent.compile")
    with pytest.raises(KeyError, match="its own fault"):
        run(torch.zeros(1))
