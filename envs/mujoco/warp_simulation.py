"""Simulations of one MuJoCo model on MuJoCo Warp: on a CUDA device, or on Warp's CPU for tests.

The interface is that of :class:`~genpol.envs.mujoco.simulation.BatchedSimulation`, in float32 and
on the device: tasks are the same classes. Start states are drawn by the tasks on the CPU, as ever
and with equal numbers, and copied over; after that nothing leaves the device. On CUDA a control
step is captured as a graph when it is first made.

One thing differs beside the precision: under a capsule on the floor, Warp lays the first tangent of
the contact along an axis of the world and MuJoCo along the capsule. A pyramidal friction cone then
lies otherwise, so that Ant-v5 slides otherwise; with an elliptic one both agree.

Warp compiles its kernels for a model's features at the first step, which takes a minute or more,
and keeps them in a cache on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import mujoco
import torch
from torch import Tensor

from genpol.envs.mujoco.simulation import BatchedSimulation, Stage
from genpol.errors import ConfigError, require

# Parts of the state that the next step depends on, warm starts included.
_STATE = ("qpos", "qvel", "act", "ctrl", "qacc_warmstart", "time")
_PLACES = {"geom_xpos", "site_xpos"}
# Room per simulation; Warp's own estimate is too small for the dog.
_CONTACTS = 64
_CONSTRAINTS = 512
_DISABLE_ACTUATION = int(mujoco.mjtDisableBit.mjDSBL_ACTUATION)


class WarpSimulation:
    """``num_envs`` simulations of one model, stepped together by MuJoCo Warp.

    Attributes:
        model: The compiled model that all simulations share.
        qpos: Generalised positions ``[num_envs, nq]``, live and writable.
        qvel: Generalised velocities ``[num_envs, nv]``.
        act: Actuator activations ``[num_envs, na]``.
        ctrl: Controls ``[num_envs, nu]``, in the actuators' own units.
        persistent: True; all simulations keep all of their data.
        device: Where they live.
        dtype: float32.

    Args:
        model: The MuJoCo model.
        num_envs: Number of simulations.
        fields: Names of derived ``MjData`` fields that :meth:`field` will give.
        expanded: Names of ``MjModel`` fields that differ between simulations.
        device: ``cuda``, ``cuda:1`` or ``cpu``.
        num_threads: Cores that draw start states; 0 takes all.

    Raises:
        ConfigError: If Warp cannot simulate the model.
        MissingExtraError: If MuJoCo Warp is not installed.
    """

    dtype = torch.float32
    persistent = True

    def __init__(
        self,
        model: mujoco.MjModel,
        num_envs: int,
        *,
        fields: Sequence[str] = (),
        expanded: Sequence[str] = (),
        device: torch.device | str = "cpu",
        num_threads: int = 0,
    ) -> None:
        self._warp: Any = require("warp", "warp")
        self._mjw: Any = require("mujoco_warp", "warp")
        self._warp.config.quiet = True
        self.model = model
        self.num_envs = num_envs
        self.device = torch.device(device)
        self._starter = BatchedSimulation(
            model,
            num_envs,
            fields=fields,
            expanded=expanded,
            num_threads=num_threads,
            persistent=False,
        )
        name = str(self.device) if self.device.type != "cuda" else f"cuda:{self.device.index or 0}"
        with self._warp.ScopedDevice(name):
            try:
                self._model = self._mjw.put_model(model, dict.fromkeys(expanded, num_envs))
                self._data = self._mjw.make_data(
                    model, nworld=num_envs, nconmax=_CONTACTS, njmax=_CONSTRAINTS
                )
            except NotImplementedError as error:
                raise ConfigError(
                    f"env.backend = 'warp': MuJoCo Warp cannot simulate this task ({error}); leave "
                    "env.backend at batch"
                ) from None
        self._name = name
        self._state = {key: self._tensor(getattr(self._data, key)) for key in _STATE}
        self.qpos, self.qvel = self._state["qpos"], self._state["qvel"]
        self.act, self.ctrl = self._state["act"], self._state["ctrl"]
        # What Warp does not have is looked at in start states alone.
        self._fields = {
            key: self._tensor(getattr(self._data, key))
            for key in fields
            if hasattr(self._data, key)
        }
        self._model_fields = {key: self._tensor(getattr(self._model, key)) for key in expanded}
        self._graphs: dict[Any, Any] = {}
        self._host: mujoco.MjData | None = None

    def field(self, name: str) -> Tensor:
        """See :class:`~genpol.envs.mujoco.simulation.BatchedSimulation`."""
        return self._fields[name]

    def model_field(self, name: str) -> Tensor:
        """See :class:`~genpol.envs.mujoco.simulation.BatchedSimulation`."""
        return self._model_fields[name]

    def step(self, num_substeps: int, stage: Stage) -> None:
        """Advance all simulations by ``num_substeps`` under ``ctrl``."""

        def advance() -> None:
            for _ in range(num_substeps):
                self._mjw.step(self._model, self._data)
            if stage >= Stage.VELOCITY:
                self._refresh()

        self._run(("step", num_substeps, int(stage)), advance)

    def start(self, ids: Tensor, initialize: Callable[[BatchedSimulation], None]) -> None:
        """See :class:`~genpol.envs.mujoco.simulation.BatchedSimulation`."""
        rows = ids.cpu()
        self._starter.reset(rows)
        initialize(self._starter)
        for key in ("qpos", "qvel", "act", "ctrl"):
            self._copy(self._state[key], ids, getattr(self._starter, key)[rows])
        for key in ("qacc_warmstart", "time"):
            self._state[key][ids] = 0.0
        if not self._model_fields:
            return
        # Warp computes where what never moves is only once: targets are put there by hand.
        self._starter.forward(rows, Stage.POSITION)
        for key, x in self._model_fields.items():
            self._copy(x, ids, self._starter.model_field(key)[rows])
        for key in _PLACES & self._fields.keys():
            self._copy(self._fields[key], ids, self._starter.field(key)[rows])

    def _copy(self, x: Tensor, ids: Tensor, rows: Tensor) -> None:
        x[ids] = rows.to(self.device, self.dtype).view(len(ids), *x.shape[1:])

    def forward(
        self,
        ids: Tensor | None = None,
        stage: Stage = Stage.ACCELERATION,
        *,
        actuated: bool = True,
    ) -> None:
        """Compute the derived fields of all simulations, whatever ``ids``, at their present state.

        See :class:`~genpol.envs.mujoco.simulation.BatchedSimulation`.
        """

        def compute() -> None:
            if stage >= Stage.ACCELERATION:
                self._mjw.forward(self._model, self._data)
            else:
                self._refresh()

        with nullcontext() if actuated else self._actuation_disabled():
            self._run(("forward", int(stage), actuated), compute)

    def pop_diverged(self) -> Tensor:
        """Return which simulations ``[num_envs]`` diverged since the last call, and forget it.

        Warp tells of nothing: a state that is not finite, or beyond MuJoCo's greatest value, has
        diverged.
        """
        state = torch.cat((self.qpos, self.qvel), dim=-1)
        # NaN fails the comparison.
        return ~state.abs().lt(mujoco.mjMAXVAL).all(-1)

    def compute_contact_forces(self) -> Tensor:
        """Return ``cfrc_ext`` ``[num_envs, nbody, 6]`` after a step."""
        self._run(
            ("contact forces",), lambda: self._mjw.rne_postconstraint(self._model, self._data)
        )
        return self._tensor(self._data.cfrc_ext)

    def state(self) -> dict[str, Tensor]:
        """See :class:`~genpol.envs.mujoco.simulation.BatchedSimulation`."""
        state = {key: x.clone() for key, x in self._state.items()}
        return state | {f"model.{key}": x.clone() for key, x in self._model_fields.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See :class:`~genpol.envs.mujoco.simulation.BatchedSimulation`."""
        for key, x in self._state.items():
            x.copy_(state[key])
        for key, x in self._model_fields.items():
            x.copy_(state[f"model.{key}"])
        self.forward(stage=Stage.VELOCITY)

    def copy_rows(self, source: Tensor) -> None:
        """See :class:`~genpol.envs.mujoco.simulation.BatchedSimulation`."""
        state = self.state()
        self.load_state({key: x[source.to(x.device)] for key, x in state.items()})

    def model_of(self, index: int) -> mujoco.MjModel:
        """See :class:`~genpol.envs.mujoco.simulation.BatchedSimulation`."""
        if not self._model_fields:
            return self.model
        for key, x in self._model_fields.items():
            own = self._starter.model_field(key)
            own[index] = x[index].to(own).view(own.shape[1:])
        return self._starter.model_of(index)

    def data_of(self, index: int) -> mujoco.MjData:
        """Return a copy of simulation ``index``'s state."""
        if self._host is None:
            self._host = mujoco.MjData(self.model)
        for key in ("qpos", "qvel", "act", "ctrl"):
            getattr(self._host, key)[:] = self._state[key][index].double().cpu().numpy()
        return self._host

    def _refresh(self) -> None:
        """Compute what depends on positions and velocities alone, as mjSTAGE_VEL does."""
        mjw, model, data = self._mjw, self._model, self._data
        mjw.fwd_kinematics(model, data)
        mjw.transmission(model, data)
        mjw.sensor_pos(model, data)
        mjw.fwd_velocity(model, data)
        mjw.sensor_vel(model, data)

    def _run(self, key: Any, work: Callable[[], None]) -> None:
        """Do some work on torch's stream; on CUDA as a graph that is captured once."""
        warp = self._warp
        if self.device.type != "cuda":
            with warp.ScopedDevice(self._name):
                work()
            return
        stream = warp.stream_from_torch(torch.cuda.current_stream(self.device))
        with warp.ScopedDevice(self._name), warp.ScopedStream(stream):
            if key not in self._graphs:
                work()  # once as it is, so that kernels are loaded before the capture
                with warp.ScopedCapture() as capture:
                    work()
                self._graphs[key] = capture.graph
                return
            warp.capture_launch(self._graphs[key])

    @contextmanager
    def _actuation_disabled(self) -> Iterator[None]:
        options = self._model.opt
        flags = options.disableflags
        options.disableflags = flags | _DISABLE_ACTUATION
        try:
            yield
        finally:
            options.disableflags = flags

    def _tensor(self, array: Any) -> Tensor:
        """Return a live view of Warp's array, matrices as their nine numbers."""
        x: Tensor = self._warp.to_torch(array)
        return x.flatten(-2) if x.dim() == 4 else x
