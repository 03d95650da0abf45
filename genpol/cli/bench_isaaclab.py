"""What `genpol bench env=isaaclab` measures: the simulation, with a policy, and with learning.

Beside them stand Isaac Lab's own trainers on the same task; its module
:mod:`genpol.report.isaaclab_yardsticks` says what is equal between the contenders and what is not.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, cast

from genpol.cli import bench_stepping
from genpol.errors import ConfigError

if TYPE_CHECKING:
    from torchrl.envs import EnvBase

    from genpol.report.benchmark import Contender
    from genpol.training.settings import TrainSettings

KEYS = (
    *("isaaclab-env", "genpol-env", "genpol-policy", "rsl_rl-policy", "torchrl-policy"),
    *("genpol-collector", "genpol-learning", "rsl_rl-learning", "torchrl-learning"),
)
# What is asked of the library: (first, second, name, wanted).
RATIOS = (
    ("genpol-env", "isaaclab-env", "environment / Isaac Lab's", ""),
    ("genpol-collector", "rsl_rl-policy", "with the policy / rsl_rl", ""),
    ("genpol-collector", "torchrl-policy", "with the policy / torchrl", ""),
    ("genpol-learning", "rsl_rl-learning", "with learning / rsl_rl", ""),
    ("genpol-learning", "torchrl-learning", "with learning / Isaac Lab's torchrl trainer", ""),
)
_ALIKE = (
    *("rollout_steps", "epochs", "minibatches", "actor_hidden", "critic_hidden", "learning_rate"),
    *("clip", "gamma", "gae_lambda", "max_grad_norm"),
)


def contenders(settings: TrainSettings) -> list[Contender]:
    """Return all contenders, those that are compared side by side.

    Raises:
        ConfigError: If the agent is not PPO.
    """
    from genpol.report import isaaclab_yardsticks

    if settings.choices.agent != "ppo":
        raise ConfigError(
            f"agent={settings.choices.agent}: beside Isaac Lab's trainers stands PPO; set agent=ppo"
        )
    shared = _Shared(settings)
    workload = isaaclab_yardsticks.Workload(
        **{name: getattr(settings.agent, name) for name in _ALIKE}, device=settings.device
    )
    others = isaaclab_yardsticks.yardsticks(lambda cleanup: shared.open(cleanup).sim, workload)
    own = bench_stepping.own(settings, shared.open)
    return sorted([*own, *others], key=lambda contender: KEYS.index(contender.key))


class _Shared:
    """The one simulation that a process can have; whoever needs it first opens it."""

    def __init__(self, settings: TrainSettings) -> None:
        self._settings = settings
        self._env: Any = None

    def open(self, cleanup: ExitStack) -> Any:
        from genpol import envs

        settings = self._settings
        if self._env is None:
            self._env = cast(
                "EnvBase",
                envs.make(
                    settings.env,
                    num_envs=settings.num_envs,
                    device=settings.device,
                    seed=settings.seed,
                    training=True,
                ),
            )
            cleanup.callback(self._env.close, raise_if_closed=False)
        return self._env
