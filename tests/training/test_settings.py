"""What the settings of a run say together."""

from __future__ import annotations

import pytest

from genpol.envs.settings import GymSettings, MujocoSettings
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
