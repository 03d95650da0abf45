"""``link=sim``: a simulation that behaves like a robot, in a process of its own and in real time.

It knows nothing of the policy: it tells its observation at the beginning of a period over UDP on
this machine, waits until the period's end, and then steps with the newest command that has come; if
none has, with the last one, and counts that. So what goes wrong on the way shows in the return.
"""

from __future__ import annotations

import multiprocessing
import secrets
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from genpol.deploy.contract import Contract
from genpol.errors import ConfigError, GenpolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torchrl.envs import EnvBase

_START_S = 120.0
_END_S = 10.0
_POLL_S = 0.05


class SimulationError(GenpolError):
    """The simulation cannot be started."""


@dataclass(frozen=True)
class Outcome:
    """What a simulation saw.

    Attributes:
        returns: Of each complete episode.
        lengths: Steps of each.
        successes: Whether the last step of each solved the task; empty where that is not told.
        periods: That passed.
        missed: Of these, without a command.
    """

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    successes: list[bool] = field(default_factory=list)
    periods: int = 0
    missed: int = 0


@dataclass(frozen=True)
class _Task:
    """What the process is told."""

    family: str
    simulation: Mapping[str, Any]
    commands: Sequence[tuple[float, float]]
    goal: bool
    period_s: float
    seed: int
    episodes: int
    key: bytes
    viewer: bool


class Simulation:
    """A simulated robot.

    Args:
        contract: Of the bundle, which tells how it was simulated.
        seed: Of the start states: those of `genpol eval` with evaluation.num_envs=1.
        episodes: After which it ends; 0 for never.
        viewer: Whether to open a window.

    Attributes:
        address: Where it listens.
        key: For the link.

    Raises:
        ConfigError: If the contract does not tell.
        SimulationError: If it cannot be started.
    """

    def __init__(self, contract: Contract, *, seed: int, episodes: int, viewer: bool) -> None:
        source = contract.source
        if "simulation" not in source:
            raise ConfigError("link=sim: the contract tells no simulation; export the run anew")
        self.key = secrets.token_bytes(16)
        task = _Task(
            family=str(source["simulator"]),
            simulation=source["simulation"],
            commands=contract.commands,
            goal=contract.goal_dim > 0,
            period_s=contract.period_s,
            seed=seed,
            episodes=episodes,
            key=self.key,
            viewer=viewer,
        )
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_work, args=(theirs, task), name="genpol simulation", daemon=True
        )
        self._process.start()
        theirs.close()
        self._outcome = Outcome()
        self._waiting: threading.Thread | None = None
        try:
            told = self._connection.recv() if self._connection.poll(_START_S) else "no answer"
        except (EOFError, OSError):
            told = "its process ended"
        if not isinstance(told, tuple):
            self._process.kill()
            raise SimulationError(f"link=sim: {told}")
        (self.address,) = told

    def when_done(self, call: Callable[[], None]) -> None:
        """Have something called in a thread when all episodes are over."""

        def wait() -> None:
            with suppress(EOFError, OSError):
                self._outcome = self._connection.recv()
            call()

        self._waiting = threading.Thread(target=wait, daemon=True)
        self._waiting.start()

    def close(self) -> Outcome:
        """End it, and return what it saw."""
        with suppress(OSError):
            self._connection.send(None)
        if self._waiting is not None:
            self._waiting.join(_END_S)
        self._process.join(_END_S)
        if self._process.is_alive():
            self._process.kill()
        return self._outcome


def _work(connection: Connection, task: _Task) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from genpol.deploy.links.udp import UdpRobot

    try:
        robot = UdpRobot("127.0.0.1:0", task.key)
        env = _make(task)
        window = _window(env) if task.viewer else None
    except Exception as error:
        connection.send(" ".join(str(error).split()) or type(error).__name__)
        return
    connection.send((robot.address,))
    outcome = _Loop(task, robot, env, connection, window).run()
    with suppress(OSError):
        connection.send(outcome)
    robot.close()
    env.close()


def _make(task: _Task) -> EnvBase:
    import torch

    from genpol.envs import make, settings_classes

    torch.set_num_threads(1)
    known = settings_classes()
    if task.family not in known:
        raise ConfigError(f"there is no simulator {task.family!r}")
    # The controller keeps the history: a robot tells what it sees now.
    settings = {**task.simulation, "observation_steps": 1}
    if "num_threads" in settings:
        settings["num_threads"] = 1
    return make(known[task.family](**settings), num_envs=1, seed=task.seed)


def _window(env: EnvBase) -> Callable[[], None]:
    from genpol.envs.mujoco.window import open_window

    return open_window(env)


class _Loop:
    """The robot's side."""

    def __init__(
        self,
        task: _Task,
        robot: Any,
        env: EnvBase,
        connection: Connection,
        window: Callable[[], None] | None,
    ) -> None:
        self._task = task
        self._robot = robot
        self._env = env
        self._connection = connection
        self._window = window
        self._command: list[float] | None = None
        self._outcome = Outcome()
        self._periods = 0
        self._missed = 0

    def run(self) -> Outcome:
        """Return what was seen until all episodes are over, or the other side wants an end."""
        import torch

        while not self._robot.connected:
            self._robot.command(_POLL_S)
            if self._asked_to_end():
                return self._outcome
        deadline = time.monotonic()
        episode = 0
        with torch.no_grad():
            while not self._task.episodes or episode < self._task.episodes:
                self._env.set_seed(self._task.seed + episode)
                ended = self._episode(deadline)
                if ended is None:
                    break
                deadline = ended
                episode += 1
        found = self._outcome
        return Outcome(found.returns, found.lengths, found.successes, self._periods, self._missed)

    def _episode(self, deadline: float) -> float | None:
        """Return when it ended; ``None`` if it was asked to end before."""
        import torch

        step = self._env.reset()
        total, length, first = 0.0, 0, True
        while True:
            self._tell(step, first=first)
            first = False
            deadline += self._task.period_s
            self._listen_until(deadline)
            if self._asked_to_end():
                return None
            action = torch.tensor([self._action()], dtype=torch.float32)
            after = self._env.step(step.set("action", action))["next"]
            if self._window is not None:
                self._window()
            total += float(after["reward"])
            length += 1
            if bool(after["done"]):
                break
            step = after
        self._outcome.returns.append(total)
        self._outcome.lengths.append(length)
        solved = after.get("success", None)
        if solved is not None:
            self._outcome.successes.append(bool(solved))
        return deadline

    def _tell(self, step: Any, *, first: bool) -> None:
        values = step["observation"][0].tolist()
        if self._task.goal:
            values += step["goal"][0].tolist()
        self._robot.observation(values, first=first)

    def _listen_until(self, deadline: float) -> None:
        self._periods += 1
        heard = False
        while (left := deadline - time.monotonic()) > 0:
            command = self._robot.command(left)
            if command is not None:
                self._command, heard = command.values, True
        self._missed += not heard

    def _action(self) -> list[float]:
        """Return the last command as an action in [-1, 1]; the middle before there is any."""
        if self._command is None:
            return [0.0] * len(self._task.commands)
        return [
            2.0 * (value - low) / (high - low) - 1.0
            for value, (low, high) in zip(self._command, self._task.commands, strict=True)
        ]

    def _asked_to_end(self) -> bool:
        try:
            return self._connection.poll(0)
        except OSError:
            return True
