"""What a new run begins from, once it is found: a checkpoint or a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol.errors import CheckpointError

if TYPE_CHECKING:
    from genpol.agent import Agent, Specs
    from genpol.pretrained import PretrainedPolicy
    from genpol.training.settings import TrainSettings


@dataclass(frozen=True)
class Start:
    """What a new run begins from.

    Attributes:
        text: As it was written.
        agent: The agent that is to begin.
        checkpoint: A checkpoint of the same agent, all of whose weights are taken; or
        policy: a model of behaviour.
    """

    text: str
    agent: str
    checkpoint: Path | None = None
    policy: PretrainedPolicy | None = None

    def settings(self) -> Mapping[str, Any] | None:
        """Return the agent's settings that describe the policy.

        Raises:
            ConfigError: If the agent does not know all that the policy has.
        """
        from genpol.agents import settings_class
        from genpol.pretrained import known_to

        if self.policy is None:
            return None
        return known_to(settings_class(self.agent), self.policy.model, self.agent)

    def defaults(self) -> Mapping[str, Any] | None:
        """Return the agent's settings that suit the policy, but may be others."""
        return None if self.policy is None else {"action_steps": self.policy.action_steps}

    def give(self, agent: Agent, settings: TrainSettings) -> None:
        """Let an agent that was just made with these settings begin from it.

        Raises:
            ConfigError: If the policy is not one for its environment.
            CheckpointError: If the checkpoint is damaged, or not of these settings.
        """
        from genpol.pretrained import PolicyHolder
        from genpol.training import checkpoint
        from genpol.training.loop import load_weights

        if self.checkpoint is not None:
            weights = checkpoint.load(self.checkpoint)["weights"]
            weights = agent.adopt(weights, _tasks_of(self.checkpoint))
            load_weights(agent, weights, self.checkpoint)
        elif self.policy is not None:
            assert isinstance(agent, PolicyHolder)
            specs, period_s = environment_of(settings)
            self.policy.check(specs, period_s, self.text)
            agent.load_policy(self.policy)


def _tasks_of(path: Path) -> list[str]:
    """Return ``env.tasks`` of the run that a checkpoint lies in; none where it has no such thing.

    A checkpoint that was copied out of its run has no such thing either.
    """
    import yaml

    from genpol.training import checkpoint

    try:
        text = (checkpoint.run_folder(path) / "config.yaml").read_text(encoding="utf-8")
        tasks = yaml.safe_load(text)["env"]["tasks"]
    except (CheckpointError, OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return []
    return [str(name) for name in tasks] if isinstance(tasks, list) else []


def environment_of(settings: TrainSettings) -> tuple[Specs, float]:
    """Return the sizes of the environment of these settings, and its control period in seconds."""
    from genpol.agent import Specs
    from genpol.envs import make

    env = make(settings.env, num_envs=1, seed=0)
    specs, period_s = Specs.from_env(env, num_envs=1), float(env.control_period_s)
    env.close()
    return specs, period_s
