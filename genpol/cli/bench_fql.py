"""What `genpol bench agent=fql` measures: FQL's updates beside a plain torch loop and JAX.

Its module :mod:`genpol.report.fql_yardsticks` says what is equal between the contenders. Updates
are measured on one batch that stays the same, and with batches drawn from data in memory. The data
are noise of the environment's sizes, which cost as much to learn from as any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

from genpol import settings as check
from genpol.errors import ConfigError

if TYPE_CHECKING:
    from genpol.offline import OfflineAgent
    from genpol.report.benchmark import Chunk, Contender
    from genpol.report.fql_yardsticks import Rows, Workload
    from genpol.training.settings import TrainSettings

KEYS = (
    *("genpol-update", "genpol-compiled", "torch-update", "jax-update"),
    *("genpol-train", "torch-train", "jax-train"),
)
# (first, second, name, wanted)
RATIOS = (
    ("genpol-update", "torch-update", "update / plain torch", ""),
    ("genpol-compiled", "torch-update", "compiled update / plain torch", ""),
    ("genpol-update", "jax-update", "update / JAX", ""),
    ("genpol-compiled", "jax-update", "compiled update / JAX", ""),
    ("genpol-train", "torch-train", "with batches from data / plain torch", ""),
    ("genpol-train", "jax-train", "with batches from data / JAX", ""),
)
DEFAULTS = {"env": "cube-single-play"}
_ROWS = 20_000
_TRAJECTORY = 200


def baseline(key: str) -> str:
    """Return to whom a contender is compared in the table."""
    return "torch-train" if key.endswith("-train") else "torch-update"


def title(settings: TrainSettings) -> str:
    """Return the sizes in words."""
    agent = settings.agent
    return (
        f"batches of {agent.batch_size}, actor {_widths(agent.actor.hidden)}, critics "
        f"{agent.num_critics} x {_widths(agent.critic.hidden)}, {agent.solver_steps} flow steps; "
        "updates/s"
    )


def _widths(hidden: list[int]) -> str:
    return "-".join(map(str, hidden))


def contenders(settings: TrainSettings) -> list[Contender]:
    """Return all contenders, those that are compared side by side.

    Raises:
        ConfigError: If the settings are not comparable with the FQL of others.
    """
    _check(settings)
    from genpol.agent import Specs
    from genpol.cli.building import build
    from genpol.report import fql_yardsticks as others
    from genpol.report.benchmark import Contender

    specs: Specs = build(settings)[0].specs
    work = _workload(settings, specs)
    rows = _noise(work)
    table: list[tuple[str, str, Callable[[], Chunk]]] = [
        ("genpol-update", "agent.update()", partial(_update, settings, rows)),
        ("genpol-compiled", "the same with agent.compile=true", partial(_compiled, settings, rows)),
        ("torch-update", "a plain torch loop", partial(others.torch_update, work, rows)),
        ("jax-update", "a jitted JAX update", partial(others.jax_update, work, rows)),
        ("genpol-train", "windows of a data set, update", partial(_train, settings, rows)),
        ("torch-train", "rows by index, plain torch", partial(others.torch_train, work, rows)),
        ("jax-train", "rows by index, JAX", partial(others.jax_train, work, rows)),
    ]

    def contender(key: str, what: str, make: Callable[[], Chunk]) -> Contender:
        def start(cleanup: ExitStack) -> Chunk:
            return make()

        return Contender(key=key, what=what, build=start)

    return [contender(*entry) for entry in table]


def _check(settings: TrainSettings) -> None:
    agent = settings.agent
    wanted: dict[str, Any] = {
        "horizon": 1,
        "policy": "one_step",
        "aggregate": "mean",
        "normalize_q": False,
        "normalize_observations": False,
        "denoiser": "flow",
        "actor.layer_norm": "none",
        "critic.activation": agent.actor.activation,
        "critic.layer_norm": "after",
    }
    for name, value in wanted.items():
        found = agent
        for part in name.split("."):
            found = getattr(found, part)
        if found != value:
            raise ConfigError(
                f"agent.{name} = {found!r}: the FQL of others has {value!r}; leave it out"
            )
    check.one_of("agent.actor.activation", agent.actor.activation, ("gelu", "gelu_tanh"))
    if settings.device != "cpu":
        raise ConfigError(f"device = {settings.device!r}: must be cpu, to compare the same cores")


def _workload(settings: TrainSettings, specs: Any) -> Workload:
    from genpol.report.fql_yardsticks import Workload

    agent = settings.agent
    return Workload(
        observation_dim=specs.observation_dim,
        action_dim=specs.action_dim,
        actor_hidden=agent.actor.hidden,
        critic_hidden=agent.critic.hidden,
        activation=agent.actor.activation,
        seed=settings.seed,
        **{
            name: getattr(agent, name)
            for name in (
                *("batch_size", "num_critics", "solver_steps", "alpha", "polyak"),
                "learning_rate",
            )
        },
    )


def _noise(work: Workload) -> Rows:
    """Return transitions of noise."""
    import numpy as np

    draw = np.random.default_rng(work.seed)
    rows = max(_ROWS, work.batch_size)
    columns = {
        "observation": draw.normal(size=(rows, work.observation_dim)),
        "next_observation": draw.normal(size=(rows, work.observation_dim)),
        "action": draw.uniform(-1, 1, (rows, work.action_dim)),
        "reward": draw.normal(size=rows),
        "discount": np.full(rows, 0.99),
    }
    return {name: x.astype(np.float32) for name, x in columns.items()}


def _agent(settings: TrainSettings, **changes: Any) -> OfflineAgent:
    from dataclasses import replace

    from genpol.cli.building import build
    from genpol.offline import OfflineAgent

    agent, _ = build(replace(settings, agent=replace(settings.agent, **changes)))
    assert isinstance(agent, OfflineAgent)
    return agent


def _batch(settings: TrainSettings, rows: Rows) -> Any:
    """Return the first rows as windows."""
    import torch
    from tensordict import TensorDict

    size = settings.agent.batch_size
    first = {name: torch.from_numpy(x[:size]) for name, x in rows.items()}
    fields = {name: first[name] for name in ("observation", "reward", "discount")}
    fields |= {"action": first["action"].unsqueeze(1), "weight": torch.ones(size)}
    fields["valid"] = torch.ones(size, 1, dtype=torch.bool)
    fields["next"] = TensorDict({"observation": first["next_observation"]}, [size])
    return TensorDict(fields, [size])


def _update(settings: TrainSettings, rows: Rows) -> Chunk:
    agent, batch = _agent(settings, compile=False), _batch(settings, rows)
    return _warm(lambda: agent.update(batch))


def _compiled(settings: TrainSettings, rows: Rows) -> Chunk:
    from genpol.report.benchmark import SkippedError

    agent, batch = _agent(settings, compile=True), _batch(settings, rows)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="agent.compile")
        try:
            return _warm(lambda: agent.update(batch))
        except UserWarning as reason:
            raise SkippedError(str(reason)) from None


def _train(settings: TrainSettings, rows: Rows) -> Chunk:
    import numpy as np

    from genpol.data.dataset import OfflineDataset
    from genpol.data.windows import WindowSampler

    number = len(rows["reward"])
    columns = {name: rows[name] for name in ("observation", "action", "reward")}
    columns["terminated"] = np.zeros(number, dtype=bool)
    ends = np.append(np.arange(_TRAJECTORY - 1, number - 1, _TRAJECTORY), number - 1)
    agent = _agent(settings, compile=False)
    for name in ("action", "reward"):  # as a data set has them in final states
        columns[name] = columns[name].copy()
        columns[name][ends] = 0
    windows = WindowSampler(OfflineDataset(columns, ends, {}), agent.window, seed=settings.seed)
    return _warm(lambda: agent.update(windows.sample(agent.batch_size)))


def _warm(work: Callable[[], Any]) -> Chunk:
    def chunk() -> int:
        work()
        return 1

    chunk()
    return chunk
