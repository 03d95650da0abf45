"""An environment in a process of its own, where this one can have only one of its kind."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from genpol.errors import EnvironmentFault, GenpolError

_SHUTDOWN_S = 10.0


class _About(NamedTuple):
    """What an environment says of itself when it is there."""

    specs: dict[str, TensorSpec]
    max_episode_steps: int
    action_repeat: int
    control_period_s: float


class WorkerEnv(EnvBase):
    """A batched environment ``[num_envs]`` that lives in a worker process.

    For evaluation: what it gives crosses processes over the CPU.

    Attributes:
        name: The environment's name.
        max_episode_steps: Environment steps until truncation.
        action_repeat: Environment steps per step.
        control_period_s: Seconds of simulated time per step.

    Args:
        create: Makes the environment; it is sent to the worker.
        name: The environment's name.
        num_envs: Number of environments in it.
        device: Where tensors are given and taken.
        seed: Seed of the start states.

    Raises:
        EnvironmentFault: If the environment cannot be made, or the worker dies, here or later.
        GenpolError: Whatever making the environment raises.
    """

    batch_locked = True
    _SPECS = ("observation_spec", "action_spec", "reward_spec", "full_done_spec")

    def __init__(
        self,
        create: Callable[[], EnvBase],
        *,
        name: str,
        num_envs: int,
        device: torch.device | str,
        seed: int,
    ) -> None:
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe: Connection | None
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, create), daemon=True)
        self._process.start()
        theirs.close()
        about: _About = self._answer()
        for key, spec in about.specs.items():
            setattr(self, key, spec.to(self.device))
        self.max_episode_steps = about.max_episode_steps
        self.action_repeat = about.action_repeat
        self.control_period_s = about.control_period_s
        self.is_closed = False
        self.set_seed(seed)

    @property
    def num_diverged(self) -> int:
        """Episodes that ended by divergence so far."""
        return int(self._ask("num_diverged"))

    def _ask(self, what: str, argument: Any = None) -> Any:
        if self._pipe is None:
            raise EnvironmentFault(f"environment {self.name} has stopped: make it anew")
        with suppress(OSError):  # the answer tells
            self._pipe.send((what, argument))
        return self._answer()

    def _answer(self) -> Any:
        assert self._pipe is not None
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(_SHUTDOWN_S)
            code = self._process.exitcode
            self._end()
            raise EnvironmentFault(
                f"the process of environment {self.name} ended with exit code {code}"
            ) from None
        if isinstance(answer, GenpolError):
            self._end()
            raise answer
        return answer

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._ask("seed", seed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        return self._tensors(self._ask("reset", None if mask is None else mask.cpu().numpy()))

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        return self._tensors(self._ask("step", tensordict["action"].cpu().numpy()))

    def _tensors(self, arrays: dict[str, np.ndarray]) -> TensorDict:
        tensors = {key: torch.from_numpy(x) for key, x in arrays.items()}
        return TensorDict(tensors, self.batch_size).to(self.device)

    def render(self, index: int = 0, *, height: int = 360, width: int = 480) -> np.ndarray:
        """Refuse: a picture would have to cross processes.

        Raises:
            EnvironmentFault: Always.
        """
        raise EnvironmentFault(f"environment {self.name} cannot be drawn here: set video=false")

    def state_dict_of_simulation(self) -> None:
        """Return None: nothing of a simulation in another process is kept."""
        return

    def load_simulation(self, state: None) -> None:
        """Accept None, which is all that :meth:`state_dict_of_simulation` returns."""

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the environment and end the worker."""
        if self._pipe is not None:
            with suppress(OSError):
                self._pipe.send(("close", None))
            self._process.join(_SHUTDOWN_S)
            self._end()
        super().close(raise_if_closed=raise_if_closed)

    def _end(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            pipe.close()
        with suppress(ValueError):  # closed already
            self._process.kill()
            self._process.join(_SHUTDOWN_S)


def _work(pipe: Connection, create: Callable[[], EnvBase]) -> None:
    """Make an environment and do with it what is asked, until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to heed
    env: EnvBase | None = None
    try:
        env = create()
        specs = {key: getattr(env, key).cpu() for key in WorkerEnv._SPECS}
        pipe.send(_About(specs, env.max_episode_steps, env.action_repeat, env.control_period_s))
        while True:
            what, argument = pipe.recv()
            if what == "close":
                break
            pipe.send(_do(env, what, argument))
    except (EOFError, OSError):
        pass  # nobody is left to answer
    except GenpolError as error:
        pipe.send(error)
    except Exception as error:
        message = " ".join(str(error).split())[:400]
        pipe.send(EnvironmentFault(f"its process raised {type(error).__name__}: {message}"))
    finally:
        if env is not None:
            env.close()


def _do(env: EnvBase, what: str, argument: Any) -> Any:
    match what:
        case "seed":
            return env.set_seed(argument)
        case "reset":
            mask = None
            if argument is not None:
                mask = TensorDict({"_reset": torch.from_numpy(argument)}, env.batch_size)
            return _arrays(env.reset(mask))
        case "step":
            action = TensorDict({"action": torch.from_numpy(argument)}, env.batch_size)
            return _arrays(env.step(action.to(env.device))["next"])
        case "num_diverged":
            return env.num_diverged
    raise ValueError(f"no such request: {what}")


def _arrays(tensordict: TensorDictBase) -> dict[str, np.ndarray]:
    return {str(key): x.cpu().numpy() for key, x in tensordict.items()}
