"""Bundles that are made in seconds, and a control loop by a clock that is not real."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchrl.envs import ExplorationType

from genpol import agents
from genpol.agent import Agent, Specs
from genpol.deploy import contract as contracts
from genpol.deploy import export
from genpol.deploy.bundle import Bundle, sha256
from genpol.deploy.chunks import Answer
from genpol.deploy.contract import Channel, Contract, loosest
from genpol.deploy.controller import Controller, ControllerSettings, Report, Tick
from genpol.deploy.links import Link, Observed
from genpol.deploy.policy_process import PolicyProcess
from genpol.deploy.safety import Command, Mode, SafetyFilter
from genpol.deploy.tracing import acting, trace

# --- bundles -----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def make_agent() -> Callable[..., Agent]:
    """Return a maker of untrained agents that see 5 numbers and do 2, by name and options."""

    def make(name: str, **options: Any) -> Agent:
        specs = Specs(observation_dim=5, action_dim=2, num_envs=1)
        agent = agents.make(name, agents.settings_class(name)(**options), specs, seed=0)
        draw = torch.Generator().manual_seed(1)
        for parameter in agent.parameters():  # heads that begin at zero would hide errors
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3, generator=draw)
        return agent

    return make


@pytest.fixture(scope="session")
def write_bundle() -> Callable[..., Bundle]:
    """Return what writes an agent's bundle, with the contract's sizes and memory as they are."""

    def write(
        target: Path,
        agent: Agent,
        contract: Contract,
        formats: Sequence[str] = ("onnx",),
        **options: bool,
    ) -> Bundle:
        traced = trace(agent, **options)
        act = acting(agent, ExplorationType.DETERMINISTIC, **options).act
        observations = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))
        fitting = replace(
            contract,
            horizon=traced.horizon,
            action_steps=traced.action_steps,
            inputs=traced.inputs,
            memory=traced.memory,
        )
        return export.write(target, traced, act, fitting, observations, formats=formats)

    return write


@pytest.fixture(scope="session")
def reach() -> Contract:
    """Return a contract of 5 numbers and 2 joints, the one told positions and the other efforts."""
    return Contract(
        env="Reach",
        agent="bc",
        observation=tuple(Channel(name=f"x{i}", unit="m") for i in range(5)),
        action=(
            loosest("elbow", -1.0, 2.0, 0.02, unit="rad", interface="position"),
            loosest("motor", -3.0, 3.0, 0.02, unit="N m", interface="effort"),
        ),
        commands=((-1.0, 2.0), (-3.0, 3.0)),
        period_s=0.02,
        horizon=3,
        action_steps=2,
        inputs={"observation": (5,), "noise": (6,)},
        sampling="mode",
        solver_steps=2,
    )


@pytest.fixture(scope="session")
def make_wild_bundle() -> Callable[[Path, Contract], Bundle]:
    """Return a maker of bundles whose every action is -1 or 1, as the noise has it.

    It takes no training and no torch; the contract's inputs are filled in. With a plan as memory
    that plan is added.
    """
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    def make(folder: Path, contract: Contract) -> Bundle:
        shape = (contract.horizon, len(contract.action))
        inputs: dict[str, tuple[int, ...]] = {
            "observation": (len(contract.observation),),
            "noise": (math.prod(shape),),
        }
        if contract.memory == "plan":
            inputs["previous"] = shape
        folder.mkdir(parents=True)
        onnx.save(_wild_graph(inputs, shape), folder / "policy.onnx")
        files = {"policy.onnx": sha256(folder / "policy.onnx")}
        found = replace(contract, inputs=inputs, files=files)
        (folder / contracts.FILE).write_text(contracts.to_json(found))
        return Bundle(folder, found)

    return make


def _wild_graph(inputs: Mapping[str, tuple[int, ...]], shape: tuple[int, int]) -> Any:
    from onnx import TensorProto, helper

    # What is observed is looked at, and changes nothing unless it is not finite.
    nodes = [
        helper.make_node("Constant", [], ["shape"], value_ints=[1, *shape]),
        helper.make_node("ReduceSum", ["observation"], ["sum"], keepdims=1),
        helper.make_node("Constant", [], ["zero"], value_float=0.0),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Sign", ["noise"], ["sign"]),
        helper.make_node("Add", ["sign", "nothing"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["drawn"]),
        helper.make_node("Sum", ["drawn", *[x for x in inputs if x == "previous"]], ["chunk"]),
    ]
    taken = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, *sizes])
        for name, sizes in inputs.items()
    ]
    given = helper.make_tensor_value_info("chunk", TensorProto.FLOAT, [1, *shape])
    graph = helper.make_graph(nodes, "wild", taken, [given])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def start_policy() -> Iterator[Callable[..., PolicyProcess]]:
    """Return what starts a bundle's policy; all are ended with the test."""
    started: list[PolicyProcess] = []

    def start(bundle: Bundle, **options: Any) -> PolicyProcess:
        process = PolicyProcess(bundle.folder, bundle.contract, **options)
        started.append(process)
        process.start()
        return process

    yield start
    for process in started:
        process.close()


@pytest.fixture(scope="session")
def violation() -> Callable[[Contract, np.ndarray, list[float]], str]:
    """Return what says how commands ``[N, A]`` break a contract's limits; empty if they do not."""

    def find(contract: Contract, commands: np.ndarray, start: list[float]) -> str:
        path = np.vstack((np.tile(start, (3, 1)), commands))
        if not np.isfinite(path).all():
            return "not finite"
        for joint, column in zip(contract.action, path.T, strict=True):
            if not joint.low <= column.min() <= column.max() <= joint.high:
                return f"{joint.name}: from {column.min()} to {column.max()}"
            bounds = {
                "velocity": joint.velocity,
                "acceleration": joint.acceleration,
                "jerk": joint.jerk,
            }
            for order, (name, most) in enumerate(bounds.items(), start=1):
                if most == math.inf:
                    continue
                found = np.abs(np.diff(column, order)).max() / contract.period_s**order
                if found > most * (1.0 + 1e-6):
                    return f"{joint.name}: {name} {found} of {most}"
        return ""

    return find


@pytest.fixture(scope="session")
def as_json() -> Callable[[Any], Any]:
    """Return what takes a report to JSON and back, refusing what JSON cannot say."""
    return lambda found: json.loads(json.dumps(found, allow_nan=False))


# --- a control loop by a clock that is not real --------------------------------------------------

PERIOD = 2.0**-6  # a power of two, so that sums of it are exact
BEGIN = 4096.0

Values = Sequence[float] | None


class Clock:
    """Time passes where somebody waits.

    Args:
        oversleep: How much longer a sleep takes than it should.
    """

    def __init__(self, oversleep: Callable[[], float] = lambda: 0.0) -> None:
        self.now = BEGIN
        self._oversleep = oversleep

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0.0
        if seconds > 0.0:
            self.now += seconds + self._oversleep()

    @property
    def ticks(self) -> float:
        """The time in periods since the beginning."""
        return (self.now - BEGIN) / PERIOD

    @property
    def tick(self) -> int:
        return math.floor(self.ticks)


class Robot(Link):
    """Shows in each tick what it is told to show, and keeps what it is commanded.

    Args:
        clock: The time.
        shown: Numbers that are observed in a tick, measured when they are read; or an observation
            whose time is in ticks; ``None`` for silence.

    Attributes:
        reads: When it was read, in ticks.
        sent: Commands, and when they came, in ticks.
        stops: By the tick, why it wants a stop.
        resets: Ticks in which it wants to go on.
    """

    def __init__(self, clock: Clock, shown: Callable[[int], Values | Observed]) -> None:
        self._clock = clock
        self._shown = shown
        self.reads: list[float] = []
        self.sent: list[tuple[float, Command]] = []
        self.stops: dict[int, str] = {}
        self.resets: set[int] = set()

    def open(self) -> None:
        raise AssertionError("it is open")

    def read(self, timeout_s: float) -> Observed | None:
        self.reads.append(self._clock.ticks)
        shown = self._shown(self._clock.tick)
        if shown is None:
            self._clock.now += timeout_s
            return None
        return self.observed(shown)

    def observed(self, shown: Sequence[float] | Observed) -> Observed:
        if isinstance(shown, Observed):
            return shown._replace(measured_s=BEGIN + shown.measured_s * PERIOD)
        return Observed(tuple(shown), self._clock.now)

    def write(self, command: Command) -> None:
        self.sent.append((self._clock.ticks, Command(list(command.values), command.mode)))

    @property
    def stop_requested(self) -> str:
        return self.stops.get(self._clock.tick, "")

    def take_reset(self) -> bool:
        asked = self._clock.tick in self.resets
        self.resets.discard(self._clock.tick)
        return asked

    def statistics(self) -> dict[str, int]:
        return {"lost": 3}

    def close(self) -> None:
        raise AssertionError("that is for who opened it")


class Policy:
    """Answers after a while, as a process would.

    Args:
        clock: The time.
        periods: How long an answer takes, by the tick of the question; infinite for never.
        chunk: The actions, by the tick and what was seen.

    Attributes:
        asked: Ticks of its questions, and what it saw.
        anew: Of these, where an episode began.
        delays: What it was told of the delay, by the tick.
        fails: From which tick on it answers no more, and why.
    """

    def __init__(
        self,
        clock: Clock,
        periods: Callable[[int], float],
        chunk: Callable[[int, Sequence[float]], list[list[float]]],
    ) -> None:
        self._clock = clock
        self._periods = periods
        self._chunk = chunk
        self._question: tuple[int, float, list[list[float]]] | None = None
        self._asked_s = 0.0
        self.asked: list[tuple[int, tuple[float, ...]]] = []
        self.anew: list[int] = []
        self.delays: dict[int, int] = {}
        self.fails: dict[int, str] = {}
        self.failure = ""
        self.slowest_s = 0.0

    @property
    def pending(self) -> bool:
        return self._question is not None

    @property
    def waited_s(self) -> float:
        return self._clock.now - self._asked_s if self.pending else 0.0

    def ask(self, tick: int, observation: Sequence[float], *, delay: int, anew: bool) -> None:
        assert not self.pending
        assert not self.failure
        self.asked.append((tick, tuple(observation)))
        self.delays[tick] = delay
        self.anew += [tick] * anew
        self._asked_s = self._clock.now
        ready = self._clock.now + self._periods(tick) * PERIOD
        self._question = (tick, ready, self._chunk(tick, observation))

    def answer(self, timeout_s: float) -> Answer | None:
        if self._question is None:
            return None
        tick, ready, chunk = self._question
        until = self._clock.now + max(0.0, timeout_s)
        self._clock.now = max(self._clock.now, min(ready, until))
        if ready > until:
            return None
        self._question = None
        took = ready - self._asked_s
        self.slowest_s = max(self.slowest_s, took)
        return Answer(tick, chunk, took)

    def check(self) -> None:
        for tick, reason in self.fails.items():
            if self._clock.tick >= tick:
                self.failure, self._question = reason, None


class Rig:
    """A controller with a robot, a policy and a filter, and what it did in each tick.

    Args:
        shown: See :class:`Robot`; by default sound observations that tell their tick.
        periods: See :class:`Policy`; by default it answers at once.
        chunk: See :class:`Policy`; by default the tick of each action, in thousandths.
        contract: By default one action of one joint that may do anything.
        start: Commands that the filter begins from; zeros by default.
        hold_ticks: Of the filter.
        oversleep: See :class:`Clock`.
        while_looking: Called with each tick.
        options: Of :class:`ControllerSettings`.
    """

    def __init__(
        self,
        shown: Callable[[int], Values | Observed] = lambda tick: (0.0, float(tick)),
        *,
        contract: Contract,
        periods: Callable[[int], float] = lambda tick: 0.0,
        chunk: Callable[[int, Sequence[float]], list[list[float]]] | None = None,
        start: Sequence[float] | None = None,
        hold_ticks: int = 3,
        oversleep: Callable[[], float] = lambda: 0.0,
        while_looking: Callable[[Tick], None] = lambda tick: None,
        **options: Any,
    ) -> None:
        def own(tick: int, observation: Sequence[float]) -> list[list[float]]:
            return [[1e-3 * (tick + i)] for i in range(contract.horizon)]

        self.clock = Clock(oversleep)
        self.robot = Robot(self.clock, shown)
        self.policy = Policy(self.clock, periods, chunk or own)
        start = [0.0] * len(contract.action) if start is None else start
        self.safety = SafetyFilter(contract.action, PERIOD, start, hold_s=hold_ticks * PERIOD)
        self.ticks: list[Tick] = []
        self._while_looking = while_looking
        self.controller = Controller(
            contract,
            self.robot,
            self.policy,
            self.safety,
            ControllerSettings(**{"frozen_s": 0.0, **options}),
            look_on=self._look,
            clock=self.clock,
            sleep=self.clock.sleep,
        )

    def _look(self, tick: Tick) -> None:
        self.ticks.append(tick)
        self._while_looking(tick)

    def run(self, ticks: float, first: Sequence[float] | Observed = (0.0, -1.0)) -> Report:
        return self.controller.run(self.robot.observed(first), ticks * PERIOD)

    @property
    def values(self) -> list[float]:
        """The first joint's command in each tick, without those of coming to rest at the end."""
        return [tick.command.values[0] for tick in self.ticks]

    @property
    def modes(self) -> list[Mode]:
        """The modes of these commands."""
        return [tick.command.mode for tick in self.ticks]

    @property
    def settling(self) -> list[Command]:
        """The commands that bring the robot to rest at the end."""
        return [command for _, command in self.robot.sent[len(self.ticks) :]]


@pytest.fixture(scope="session")
def elbow() -> Callable[..., Contract]:
    """Return a maker of contracts of one joint and two observations; see :class:`Rig`."""

    def make(horizon: int = 1, action_steps: int = 1, **changes: Any) -> Contract:
        made = Contract(
            env="Reach",
            agent="bc",
            observation=(Channel(name="elbow.position"), Channel(name="elbow.velocity")),
            action=(loosest("elbow", -1.0, 1.0, PERIOD, unit="rad", interface="position"),),
            commands=((-1.0, 1.0),),
            period_s=PERIOD,
            horizon=horizon,
            action_steps=action_steps,
            inputs={"observation": (2,), "noise": (0,)},
            sampling="mode",
        )
        return replace(made, **changes)

    return make


@pytest.fixture
def uncollected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each run a collection of all that the tests have loaded, which takes many periods."""
    monkeypatch.setattr("gc.collect", lambda *_: 0)


@pytest.fixture
def make_rig(uncollected: None, elbow: Callable[..., Contract]) -> Callable[..., Rig]:
    """Return a maker of :class:`Rig`, with the simplest contract unless another is given."""

    def make(*arguments: Any, contract: Contract | None = None, **options: Any) -> Rig:
        return Rig(*arguments, contract=contract or elbow(), **options)

    return make
