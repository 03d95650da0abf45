from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import pytest
from dm_control import suite

from genpol.report import benchmark
from genpol.report.benchmark import Contender, Measurements, Sample, SkippedError


def test_contenders_take_turns_in_alternating_order_and_are_closed() -> None:
    events: list[str] = []

    def contender(key: str) -> Contender:
        def build(cleanup: ExitStack) -> Callable[[], int]:
            cleanup.callback(events.append, f"close {key}")
            return lambda: events.append(key) or 7

        return Contender(key=key, what="", build=build)

    found = benchmark.measure([contender("a"), contender("b")], seconds=1e-9, rounds=2)
    assert events == ["a", "b", "b", "a", "close b", "close a"]
    assert [sample.work for sample in found.samples["a"]] == [7, 7]


def test_a_contender_that_cannot_take_part_is_named_with_its_reason() -> None:
    def build(cleanup: ExitStack) -> Callable[[], int]:
        raise SkippedError("pip install it")

    found = benchmark.measure([Contender(key="x", what="", build=build)], seconds=1, rounds=1)
    assert found.skipped == {"x": "pip install it"}
    assert found.ratio("x", "x") is None


def test_a_ratio_is_taken_round_by_round() -> None:
    def samples(*rates: float) -> list[Sample]:
        return [Sample(work=int(rate), seconds=1.0) for rate in rates]

    # The machine slows to a third in the last two rounds; a ratio of medians would say 0.3.
    found = Measurements(samples={"a": samples(90, 30, 30), "b": samples(100, 100, 33)})
    assert found.ratio("a", "b") == pytest.approx(0.9)


def test_native_names_lead_to_their_originals() -> None:
    from genpol import envs

    for name in envs.names():
        original = benchmark.reference(name)
        assert original is not None, name
        if not original.id:
            assert (original.domain, original.task) in suite.ALL_TASKS
    assert benchmark.reference("HopperStand") == benchmark.Reference(domain="hopper", task="stand")
    assert benchmark.reference("NoSuchTask") is None


def test_the_bare_loop_counts_control_steps_and_leaves_the_states_alone() -> None:
    model = suite.load("hopper", "stand").physics.model.ptr
    states = (np.zeros((4, model.nq)), np.zeros((4, model.nv)), np.zeros((4, model.na)))
    with ExitStack() as cleanup:
        chunk = benchmark.bare_loop(model, states, 4, 2, cleanup, control_steps=5)
        assert chunk() == 4 * 5
    assert not states[0].any()


def test_the_thin_wrapper_steps_the_suite() -> None:
    env = benchmark._suite_env(benchmark.Reference(domain="hopper", task="stand"))
    observation, _ = env.reset()
    following, reward, terminated, truncated, _ = env.step(env.action_space.sample())
    assert observation.shape == following.shape == env.observation_space.shape == (15,)
    assert 0 <= reward <= 1
    assert not terminated
    assert not truncated
