"""Simulations of one MuJoCo model as rows of tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from enum import IntEnum

import mujoco
import numpy as np
import torch
from torch import Tensor

from genpol.errors import ConfigError
from genpol.provenance import usable_cores


class Stage(IntEnum):
    """How far a call computes derived fields at the new state (MuJoCo's ``mjtStage``)."""

    NONE = int(mujoco.mjtStage.mjSTAGE_NONE)
    POSITION = int(mujoco.mjtStage.mjSTAGE_POS)
    VELOCITY = int(mujoco.mjtStage.mjSTAGE_VEL)
    ACCELERATION = int(mujoco.mjtStage.mjSTAGE_ACC)


# MuJoCo resets a simulation that trips one of these without raising: only the counter tells.
_DIVERGENCE = [
    int(mujoco.mjtWarning.mjWARN_BADQPOS),
    int(mujoco.mjtWarning.mjWARN_BADQVEL),
    int(mujoco.mjtWarning.mjWARN_BADQACC),
    int(mujoco.mjtWarning.mjWARN_BADCTRL),
]


# Memory that simulations with an own MjData may take together, and what each takes even if tiny
# (resident memory, measured with MuJoCo 3.17).
_PERSISTENT_BYTES = 2**30
_FIXED_BYTES = 176 * 2**10

_THREADS_PER_CORE = 4

_DISABLE_ACTUATION = int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)


class BatchedSimulation:
    """``num_envs`` simulations of one model, stepped together by a pool of C++ threads.

    State fields are live, writable float64 views ``[num_envs, ...]``; derived fields are refreshed
    by every call that computes them, for the simulations it names.

    Attributes:
        model: The compiled model that all simulations share.
        qpos: Generalised positions ``[num_envs, nq]``.
        qvel: Generalised velocities ``[num_envs, nv]``.
        act: Actuator activations ``[num_envs, na]``.
        ctrl: Controls ``[num_envs, nu]``, in the actuators' own units.
        persistent: Whether each simulation keeps its own ``MjData``.
        device: Where they live: the CPU.
        dtype: float64.

    Args:
        model: The MuJoCo model.
        num_envs: Number of simulations.
        fields: Names of derived ``MjData`` fields that :meth:`field` will give.
        expanded: Names of ``MjModel`` fields that differ between simulations.
        num_threads: Cores that step the physics; 0 takes all. On several the pool has four threads
            for each, which evens out simulations of unequal cost (3-5 % faster on two cores).
        persistent: Keep one ``MjData`` per simulation, which contact forces need. It saves the
            second kinematics of every call with :attr:`Stage.VELOCITY`, for more memory; ``None``
            keeps them where that is estimated at a GiB at most. Results are equal to the bit.

    Raises:
        ConfigError: If MuJoCo is older than 3.17, which has no batched stepping.
    """

    device = torch.device("cpu")
    dtype = torch.float64

    def __init__(
        self,
        model: mujoco.MjModel,
        num_envs: int,
        *,
        fields: Sequence[str] = (),
        expanded: Sequence[str] = (),
        num_threads: int = 0,
        persistent: bool | None = None,
    ) -> None:
        try:
            from mujoco.batch import Batch, SimulationError
        except ImportError:
            raise ConfigError(
                f"the native MuJoCo tasks need mujoco >= 3.17, found {mujoco.__version__}; run: "
                "pip install 'mujoco>=3.17,<4', or use env=dm_control or env=gym"
            ) from None
        self.model = model
        self.num_envs = num_envs
        self._simulation_error = SimulationError
        if persistent is None:
            persistent = num_envs * _data_bytes(model) <= _PERSISTENT_BYTES
        self.persistent = persistent
        cores = num_threads or usable_cores()
        pool_threads = 1 if cores == 1 else _THREADS_PER_CORE * cores
        self._batch = Batch(model, num_envs, pool_threads, persistent)
        self.qpos = self._bind("qpos")
        self.qvel = self._bind("qvel")
        self.act = self._bind("act")
        self.ctrl = self._bind("ctrl")
        self._fields = {name: self._bind(name) for name in fields}
        self._model_fields = {name: torch.from_numpy(self._batch.expand(name)) for name in expanded}
        self._warnings_seen = self._divergence_warnings()
        self._failed = np.zeros(num_envs, dtype=bool)
        self._scratch: mujoco.MjData | None = None

    def field(self, name: str) -> Tensor:
        """Return a derived field ``[num_envs, ...]``; it must not be written."""
        return self._fields[name]

    def model_field(self, name: str) -> Tensor:
        """Return a live model field with one value per simulation, ``[num_envs, ...]``."""
        return self._model_fields[name]

    def step(self, num_substeps: int, stage: Stage, ids: Tensor | None = None) -> None:
        """Advance simulations ``ids`` (all by default) by ``num_substeps`` under ``ctrl``."""
        rows = None if ids is None else _int32(ids)
        try:
            self._batch.step(rows, nstep=num_substeps, stage=int(stage))
        except self._simulation_error as error:
            self._failed[error.ids] = True

    def reset(self, ids: Tensor) -> None:
        """Put simulations ``ids`` at the model's default state, derived fields not computed."""
        self._batch.reset(_int32(ids), stage=int(Stage.NONE))

    def start(self, ids: Tensor, initialize: Callable[[BatchedSimulation], None]) -> None:
        """Put simulations ``ids`` into start states, derived fields not computed.

        Args:
            ids: The simulations.
            initialize: Writes the start states of ``ids`` into a simulation on the CPU, where they
                stand at the model's default state.
        """
        self.reset(ids)
        initialize(self)

    def forward(
        self,
        ids: Tensor | None = None,
        stage: Stage = Stage.ACCELERATION,
        *,
        actuated: bool = True,
    ) -> None:
        """Compute the derived fields of simulations ``ids`` at their present state.

        Args:
            ids: The simulations; all by default.
            stage: Last stage to compute.
            actuated: Whether actuators act; if not, forces are those of a robot at rest.
        """
        rows = None if ids is None else _int32(ids)
        with nullcontext() if actuated else self._actuation_disabled():
            try:
                self._batch.forward(rows, stage=int(stage))
            except self._simulation_error as error:
                self._failed[error.ids] = True

    @contextmanager
    def _actuation_disabled(self) -> Iterator[None]:
        # Flags per simulation are the only model option of a running batch that can be written.
        flags = self._batch.expand("opt.disableflags")
        flags |= _DISABLE_ACTUATION
        try:
            yield
        finally:
            flags &= ~_DISABLE_ACTUATION

    def pop_diverged(self) -> Tensor:
        """Return which simulations ``[num_envs]`` diverged since the last call, and forget it.

        MuJoCo puts a simulation whose state turned bad back to its default state without an
        error; the warning counters are the only trace.
        """
        warnings_now = self._divergence_warnings()
        diverged = (warnings_now != self._warnings_seen) | self._failed
        self._warnings_seen = warnings_now
        self._failed[:] = False
        return torch.from_numpy(diverged)

    def compute_contact_forces(self) -> Tensor:
        """Return ``cfrc_ext`` ``[num_envs, nbody, 6]`` after a step (needs ``persistent``).

        ``mj_rnePostConstraint`` is not part of a step; gymnasium calls it after each. The batch
        has no hook for it, so that each simulation is copied out in turn.
        """
        forces = torch.empty(self.num_envs, self.model.nbody, 6, dtype=torch.float64)
        rows = forces.numpy()
        if self._scratch is None:
            self._scratch = mujoco.MjData(self.model)
        data, row_of_data = self._scratch, self._scratch.cfrc_ext
        for index in range(self.num_envs):
            self._batch.get_data(index, data)
            mujoco.mj_rnePostConstraint(self.model, data)
            rows[index] = row_of_data
        return forces

    def state(self) -> dict[str, Tensor]:
        """Return copies of all that the next step depends on, warm starts included."""
        state = {"rows": torch.from_numpy(self._batch.state.copy())}
        state |= {f"model.{name}": x.clone() for name, x in self._model_fields.items()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned; position and velocity fields are made current."""
        self._batch.state[:] = state["rows"].numpy()
        for name, x in self._model_fields.items():
            x.copy_(state[f"model.{name}"])
        self.forward(stage=Stage.VELOCITY)
        self.pop_diverged()

    def copy_rows(self, source: Tensor) -> None:
        """Put simulation i into the state of simulation ``source[i]``, for all i.

        Position and velocity fields are made current; those of accelerations, such as touch
        sensors, are not.
        """
        state = self.state()
        self.load_state({name: x[source] for name, x in state.items()})

    def model_of(self, index: int) -> mujoco.MjModel:
        """Return simulation ``index``'s model, with its own values of the expanded fields."""
        return self._batch.get_model(index) if self._model_fields else self.model

    def data_of(self, index: int) -> mujoco.MjData:
        """Return simulation ``index``'s data: its own if persistent, else a copy of its state."""
        return self._batch.get_data(index)

    def _divergence_warnings(self) -> np.ndarray:
        counters: np.ndarray = self._batch.warning[:, _DIVERGENCE, 1].sum(axis=1)
        return counters

    def _bind(self, name: str) -> Tensor:
        with warnings.catch_warnings():
            # Derived fields are read-only arrays, of which torch has no notion.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return torch.from_numpy(self._batch.bind(name))


def _data_bytes(model: mujoco.MjModel) -> int:
    """Return about how much memory one ``MjData`` takes, from a step at the default state."""
    data = mujoco.MjData(model)
    mujoco.mj_step(model, data)
    return _FIXED_BYTES + int(data.nbuffer + data.maxuse_arena)


def _int32(ids: Tensor) -> np.ndarray:
    return ids.numpy().astype(np.int32)
