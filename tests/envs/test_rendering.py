"""Pictures of native simulations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from genpol import envs
from genpol.envs import MujocoSettings
from genpol.envs.mujoco.env import MujocoEnv


@pytest.fixture(scope="module")
def env(opengl: None) -> Iterator[MujocoEnv]:
    made = envs.make(MujocoSettings(name="Reacher-v5", num_threads=1), num_envs=2, seed=0)
    assert isinstance(made, MujocoEnv)
    made.reset()
    yield made
    made.close()


def test_pictures_have_the_size_asked_for(env: MujocoEnv) -> None:
    sizes = [(24, 32), (48, 64), (48, 32), (24, 32)]
    pictures = [env.render(0, height=height, width=width) for height, width in sizes]
    assert [picture.shape for picture in pictures] == [(*size, 3) for size in sizes]
    assert all(picture.dtype == np.uint8 and picture.std() > 10 for picture in pictures)
    assert np.array_equal(pictures[0], pictures[-1])


def test_a_renderer_serves_until_the_size_changes_and_is_closed_then(env: MujocoEnv) -> None:
    env.render(0, height=24, width=32)
    first = env._renderer
    assert first is not None
    env.render(1, height=24, width=32)
    assert env._renderer is first  # to make one takes longer than to draw
    env.render(0, height=32, width=24)
    with pytest.raises(RuntimeError, match="after close"):
        first.render()


def test_every_simulation_has_its_own_picture(env: MujocoEnv) -> None:
    pictures = [env.render(index, height=48, width=64) for index in range(2)]
    assert not np.array_equal(*pictures)
