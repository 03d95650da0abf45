"""When an agent acts at random, and how many updates the steps that it takes call for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tensordict import TensorDict

from genpol.agent import Specs
from genpol.world_model.settings import WorldModelSettings


class UpdatePace:
    """Counts environment steps, and the updates that are owed for them.

    Attributes:
        warming_up: Whether actions are to be random.

    Args:
        settings: Warm-up and updates per action.
        specs: Environments, and how long an action is held.
    """

    def __init__(self, settings: WorldModelSettings, specs: Specs) -> None:
        self._settings = settings
        self._specs = specs
        self._env_steps = 0
        self._updates_owed = 0.0
        self._warmup_steps = settings.warmup(specs)
        self._awaits_episode = False
        self.warming_up = self._warmup_steps > 0

    def skip_warmup(self, *, await_episode: bool) -> None:
        """Do without a warm-up, unless the settings ask for one.

        Args:
            await_episode: Whether updates begin when the first episode is over; then nothing is
                made up for (MBDPO, official code).
        """
        self._awaits_episode = False
        if self._settings.warmup_steps is None:
            self._awaits_episode = await_episode
            self._warmup_steps = 0
            self.warming_up = False

    def observe(self, rollout: TensorDict) -> int:
        """Take note of new steps; return the updates they call for."""
        settings, repeat = self._settings, self._specs.action_repeat
        self._env_steps += rollout.numel() * repeat
        if self._env_steps < self._warmup_steps:
            return 0
        if self._awaits_episode and not bool(rollout["next", "done"].any()):
            return 0
        self._awaits_episode = False
        actions = rollout.numel()
        if self.warming_up:
            missed = 0 if settings.catch_up else self._warmup_steps
            actions = (self._env_steps - missed) // repeat
        self.warming_up = False
        self._updates_owed += actions * settings.updates_per_step
        if self._env_steps // (repeat * self._specs.num_envs) < settings.horizon:
            return 0  # not one window is held yet
        updates = int(self._updates_owed)
        self._updates_owed -= updates
        return updates

    def state(self) -> dict[str, Any]:
        """Return all that going on needs."""
        return {
            "env_steps": self._env_steps,
            "updates_owed": self._updates_owed,
            "warmup_steps": self._warmup_steps,
            "warming_up": self.warming_up,
            "awaits_episode": self._awaits_episode,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state` returned, beside whatever else is there."""
        self._env_steps = state["env_steps"]
        self._updates_owed = state["updates_owed"]
        self._warmup_steps = state["warmup_steps"]
        self.warming_up = state["warming_up"]
        self._awaits_episode = state.get("awaits_episode", False)  # older checkpoints: no wait
