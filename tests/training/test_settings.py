"""What the settings of a run say together."""

from __future__ import annotations

import pytest

from genpol.envs.settings import GymSettings, MujocoSettings, MultiTaskSettings
from genpol.training.settings import EvaluationSettings, TrainSettings


@pytest.mark.parametrize(
    ("env", "num_envs", "given", "episodes", "together"),
    [
        (MujocoSettings(), 1, 0, 200, 100),  # many native simulations cost little more than one
        (MujocoSettings(), 1, 0, 50, 50),
        (MujocoSettings(), 1024, 0, 200, 200),
        (MujocoSettings(), 1024, 4, 200, 4),
        (GymSettings(), 1, 0, 200, 1),  # each would be a process
        (GymSettings(), 2, 8, 200, 8),
    ],
)
def test_evaluations_step_as_many_environments_as_pay(
    env: object, num_envs: int, given: int, episodes: int, together: int
) -> None:
    evaluation = EvaluationSettings(num_envs=given)
    settings = TrainSettings(env=env, agent=None, num_envs=num_envs, evaluation=evaluation)
    assert settings.evaluation_envs(episodes) == together


@pytest.mark.parametrize(
    ("given", "episodes", "together"),
    [
        (EvaluationSettings(episodes=10, num_envs=10), 12, 12),
        (EvaluationSettings(episodes=30, num_envs=10), 30, 12),
        (EvaluationSettings(episodes=1), 3, 3),
        (EvaluationSettings(episodes=7, episodes_per_task=10, num_envs=10), 30, 12),
    ],
)
def test_tasks_are_evaluated_on_as_many_episodes_each(
    given: EvaluationSettings, episodes: int, together: int
) -> None:
    env = MultiTaskSettings(tasks=["CartpoleSwingup", "PendulumSwingup", "ReacherEasy"])
    settings = TrainSettings(env=env, agent=None, num_envs=1, evaluation=given)
    assert settings.evaluation_episodes == episodes
    assert settings.evaluation_envs(episodes) == together
    alone = MultiTaskSettings(tasks=env.tasks, only="ReacherEasy")
    settings = TrainSettings(env=alone, agent=None, num_envs=1, evaluation=given)
    assert settings.evaluation_episodes == (given.episodes_per_task or given.episodes)
