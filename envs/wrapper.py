"""One batched environment around single torchrl environments, in this process or in workers."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import re
import signal
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded
from torchrl.envs import EnvBase, ParallelEnv, SerialEnv

from genpol.envs.base import BatchedEnv, contain_divergence
from genpol.errors import ConfigError, EnvironmentFault, GenpolError

# The time limit of environments that declare none.
_DEFAULT_EPISODE_STEPS = 1000
_SHUTDOWN_S = 2.0


@dataclass(frozen=True)
class Family:
    """How to make one torchrl environment of a simulator, and what to ask it in this process.

    Attributes:
        create: Make one; it is sent to worker processes.
        max_episode_steps: Return its time limit, if it has one.
        control_period_s: Return the simulated time of one step.
        observation_keys: Return the keys of its observations, in the simulator's order.
        render: Draw it, given height and width.
        extras: What else it gives with every observation, passed on under the same key as the type
            that is named.
        indexed: Whether ``create`` takes the environment's index within the batch, and each seeds
            itself from that and the seed of all; else torchrl draws a seed for each.
    """

    create: Callable[..., EnvBase]
    max_episode_steps: Callable[[EnvBase], float | None]
    control_period_s: Callable[[EnvBase], float]
    observation_keys: Callable[[EnvBase], list[str]]
    render: Callable[[EnvBase, int, int], np.ndarray]
    extras: Mapping[str, torch.dtype] = field(default_factory=dict)
    indexed: bool = False


class TorchrlEnv(BatchedEnv):
    """``num_envs`` torchrl environments of one kind as a batch-locked environment ``[num_envs]``.

    Observations are concatenated in the environment's own order to one float32 vector; actions in
    ``[-1, 1]`` are mapped to the environment's bounds. A step that yields something non-finite
    ends its episode as in :class:`~genpol.envs.mujoco.env.MujocoEnv`: ``truncated`` and
    ``diverged``, reward 0 and the last good observation. ``is_init`` marks the first observation of
    an episode.

    Attributes:
        name: The environment's name.
        max_episode_steps: Steps until truncation; 1000 where the environment has no limit.
        action_repeat: 1; the environments repeat actions as they please.
        control_period_s: Seconds of simulated time per step.
        num_diverged: Episodes that ended by divergence so far.

    Args:
        name: The environment's name.
        family: How to make and to read one.
        num_envs: Number of environments; more than one run in worker processes.
        device: Where tensors are given and taken.
        seed: Seed of the first environment, from which torchrl derives the others'.
        stagger: Start the first episodes at random clocks, so that ends are spread over time.

    Raises:
        ConfigError: If observations are not vectors, or actions have no finite bounds.
        EnvironmentFault: If an environment raises or a worker dies, here or later.
    """

    def __init__(
        self,
        name: str,
        family: Family,
        *,
        num_envs: int,
        device: torch.device | str,
        seed: int,
        stagger: bool = False,
    ) -> None:
        super().__init__(num_envs, device=device)
        self.name = name
        self.num_diverged = 0
        self._family = family
        self._stagger = stagger
        self._generator = torch.Generator()
        self._elapsed = torch.zeros(num_envs, dtype=torch.int64)
        self._workers: list[BaseProcess] = []
        self._inner: EnvBase | None = None
        with self._faults():
            self._probe = family.create(**self._keywords(0))
            self._read(self._probe)
            self._inner = self._start(num_envs)
        self.set_seed(seed)

    def _read(self, probe: EnvBase) -> None:
        """Take sizes and bounds from one environment."""
        self._keys = self._family.observation_keys(probe)
        _check_spaces(self.name, probe, self._keys, self._family.extras)
        limit = self._family.max_episode_steps(probe)
        if limit is None or math.isinf(limit):
            limit = _DEFAULT_EPISODE_STEPS
        self.max_episode_steps = math.ceil(limit)
        self.control_period_s = self._family.control_period_s(probe)
        width = {key: probe.observation_spec[key].shape.numel() for key in probe.observation_spec}
        n, dim = self.batch_size[0], sum(width[key] for key in self._keys)
        space, self._action_dtype = probe.action_spec.space, probe.action_spec.dtype
        self._low, self._high = space.low.double(), space.high.double()
        self._seen = {"observation": torch.zeros(n, dim)} | {
            key: torch.zeros(n, width[key], dtype=dtype)
            for key, dtype in self._family.extras.items()
        }
        self._is_init = torch.ones(n, 1, dtype=torch.bool)
        self.declare(self._seen, action_dim=self._low.numel())

    def _start(self, num_envs: int) -> EnvBase:
        if num_envs == 1:
            return SerialEnv(1, lambda: self._probe)
        self._probe.close()
        # Daemons: a program that dies leaves no workers. num_threads: torchrl would otherwise take
        # threads from the learner.
        inner = ParallelEnv(
            num_envs,
            partial(_create_in_worker, self._family.create),
            create_env_kwargs=[self._keywords(index) for index in range(num_envs)],
            daemon=True,
            mp_start_method=_start_method(),
            num_threads=torch.get_num_threads(),
            shutdown_timeout=_SHUTDOWN_S,
        )
        inner.start()
        self._workers = list(inner._workers)
        return inner

    def _keywords(self, index: int) -> dict[str, int]:
        return {"index": index} if self._family.indexed else {}

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._generator.manual_seed(seed)
            with self._faults():
                self._running().set_seed(seed, static_seed=self._family.indexed)

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDict:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        everything = mask is None or bool(mask.all())
        mask = torch.ones(*self.batch_size, 1, dtype=torch.bool) if mask is None else mask.cpu()
        with self._faults():
            after = self._running().reset(TensorDict({"_reset": mask}, self.batch_size))
        self._seen = _choose(mask, self._read_observation(after), self._seen)
        self._is_init = self._is_init | mask
        self._elapsed = torch.where(mask.view(-1), 0, self._elapsed)
        if everything and self._stagger:
            self._stagger = False
            self._elapsed = torch.randint(
                self.max_episode_steps, self._elapsed.shape, generator=self._generator
            )
        return self.output(self._seen, is_init=self._is_init)

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        action = tensordict["action"].to("cpu", torch.float64).clamp(-1.0, 1.0)
        action = self._low + (action + 1) / 2 * (self._high - self._low)
        action = action.clamp(self._low, self._high).to(self._action_dtype)
        with self._faults():
            after = self._running().step(TensorDict({"action": action}, self.batch_size))["next"]
        self._elapsed += 1
        out_of_time = (self._elapsed >= self.max_episode_steps).unsqueeze(-1)
        outcome = contain_divergence(
            self._seen,
            self._read_observation(after),
            reward=after["reward"],
            terminated=after["terminated"],
            truncated=after["truncated"].view(-1, 1) | out_of_time,
        )
        self.num_diverged += int(outcome.diverged.sum())
        self._seen = outcome.seen
        self._is_init = torch.zeros_like(outcome.diverged)
        return self.output_of(outcome)

    def _read_observation(self, after: TensorDictBase) -> dict[str, Tensor]:
        """Copy what is passed on out of the buffers of workers."""
        vector = torch.cat([after[key].flatten(1).float() for key in self._keys], -1)
        extras = self._family.extras.items()
        return {"observation": vector} | {
            key: after[key].flatten(1).to(dtype, copy=True) for key, dtype in extras
        }

    def _running(self) -> EnvBase:
        if self._inner is None:
            raise EnvironmentFault(f"environment {self.name} has stopped: make it anew")
        return self._inner

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """Turn what torchrl raises when an environment fails into an error that says which."""
        try:
            yield
        except GenpolError:
            raise
        except Exception as error:
            message = self._describe(error)
            self._kill()
            raise EnvironmentFault(message) from error

    def _describe(self, error: Exception) -> str:
        if not self._workers:
            return f"environment {self.name} raised {type(error).__name__}: {one_line(error)}"
        # torchrl names the worker that it missed before it ended the others; where it met a
        # closed pipe instead, the others still live.
        named = re.search(r"worker (\d+) dead", str(error))
        if named is not None:
            index = int(named.group(1))
        else:
            sentinels = [worker.sentinel for worker in self._workers]
            ended = multiprocessing.connection.wait(sentinels, timeout=_SHUTDOWN_S)
            if not ended:
                return f"environment {self.name} failed in its workers: {one_line(error)}"
            index = next(i for i, sentinel in enumerate(sentinels) if sentinel in ended)
        code = self._workers[index].exitcode
        return f"worker {index} of environment {self.name} {_how_it_ended(code)}"

    def _kill(self) -> None:
        """End all workers at once; torchrl would wait for the dead."""
        for worker in self._workers:
            with suppress(ValueError):  # closed already
                worker.kill()
                worker.join(_SHUTDOWN_S)
        if self._inner is not None:
            self._inner.is_closed = True
            self._inner = None

    def render(self, index: int = 0, *, height: int = 360, width: int = 480) -> np.ndarray:
        """Draw the environment as ``uint8 [H, W, 3]``; gymnasium chooses the size itself.

        Raises:
            EnvironmentFault: With more than one environment, or if it cannot be drawn.
        """
        if self.batch_size[0] > 1:
            raise EnvironmentFault(
                f"environment {self.name} runs in worker processes, which cannot draw: "
                "make it with num_envs=1"
            )
        self._running()
        try:
            frame = self._family.render(self._probe, height, width)
        except Exception as error:
            message = f"environment {self.name} cannot be drawn: {one_line(error)}"
            raise EnvironmentFault(message) from error
        if frame is None:
            raise EnvironmentFault(f"environment {self.name} has no rgb_array drawings")
        return np.asarray(frame, dtype=np.uint8)

    def close(self, *, raise_if_closed: bool = True) -> None:
        """Close the environments and end the workers."""
        inner, self._inner = self._inner, None
        if inner is not None and not inner.is_closed:
            threads = torch.get_num_threads()
            with suppress(Exception):  # a dead worker has nothing left to close
                inner.close()
            torch.set_num_threads(threads)
        self._kill()
        super().close(raise_if_closed=raise_if_closed)


def _choose(
    mask: Tensor, where: Mapping[str, Tensor], elsewhere: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Take the rows of ``mask`` ``[N, 1]`` from one, the others from the other."""
    return {key: torch.where(mask, x, elsewhere[key]) for key, x in where.items()}


def _create_in_worker(create: Callable[..., EnvBase], **keywords: int) -> EnvBase:
    """Make an environment where Ctrl-C, which reaches every process, is the main one's to heed."""
    if multiprocessing.parent_process() is not None:  # torchrl calls this in the main process too
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return create(**keywords)


def _start_method() -> str:
    """Return how workers start: never forked from this process, whose threads they would miss.

    A fork server imports torchrl once for all workers, where each spawned one would import it anew.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__])
    return "forkserver"


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "does not answer"
    if code == -signal.SIGKILL:
        return "was killed by SIGKILL; is memory short?"
    if code < 0:
        return f"was killed by signal {-code}"
    return f"raised an error (exit code {code}); its traceback stands above"


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())


def _check_spaces(name: str, probe: EnvBase, keys: Sequence[str], extras: Collection[str]) -> None:
    """Refuse what is not a vector in, and a vector within finite bounds out."""
    spec = probe.observation_spec
    present = list(spec.keys(True, True))
    if sorted(present, key=str) != sorted([*keys, *extras]):
        raise ConfigError(
            f"environment {name} observes {present}: only one vector is supported; wrap it in "
            "gymnasium.wrappers.FlattenObservation and register that"
        )
    for key in keys:
        if not spec[key].dtype.is_floating_point or spec[key].ndim > 2:
            raise ConfigError(
                f"environment {name} observes {key!r} as {tuple(spec[key].shape)} of "
                f"{spec[key].dtype}: pixels and integers are not supported, only real vectors"
            )
    action = probe.action_spec
    fits = isinstance(action, Bounded) and action.dtype.is_floating_point and action.ndim == 1
    if not fits or not (action.space.low.isfinite() & action.space.high.isfinite()).all():
        raise ConfigError(
            f"environment {name} takes {type(action).__name__} actions of shape "
            f"{tuple(action.shape)} and {action.dtype}: only a vector of real numbers within "
            "finite bounds is supported"
        )
