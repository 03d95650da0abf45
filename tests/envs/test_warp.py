"""The native tasks on MuJoCo Warp do as on the CPU, within what float32 can tell.

On Warp's CPU device; its kernels are compiled when they are first needed.
"""

from __future__ import annotations

from typing import Any

import mujoco
import pytest
import torch

from genpol import envs
from genpol.envs.mujoco import registry
from genpol.envs.mujoco.env import MujocoEnv
from genpol.errors import ConfigError

pytest.importorskip("mujoco_warp", reason="needs the extra genpol[warp]")
pytestmark = pytest.mark.slow

NUM_ENVS = 3
TASKS = (
    *("HopperStand", "CartpoleSwingup", "CheetahRun", "WalkerWalk", "BallInCup", "HumanoidWalk"),
    *("ReacherEasy", "FingerTurnEasy", "FishSwim", "Swimmer6"),  # with a target of their own each
    *("Hopper-v5", "HalfCheetah-v5", "Pusher-v5"),
)


def make(name: str, backend: str, change: Any = None, **options: Any) -> MujocoEnv:
    task = registry.tasks()[name]()
    if change is not None:
        change(task.model)
    options = {"num_envs": NUM_ENVS, "seed": 0, "num_threads": 1, **options}
    return MujocoEnv(name, task, backend=backend, **options)


def same_state(target: MujocoEnv, source: MujocoEnv) -> None:
    """Put one environment's simulations where another's are, warm starts aside."""
    for name in ("qpos", "qvel", "act"):
        getattr(target.sim, name).copy_(getattr(source.sim, name))


def worst_of_steps(name: str, steps: int = 15, change: Any = None) -> tuple[float, float]:
    """Return the greatest differences of observations and rewards, each step from equal states."""
    cpu, warp = make(name, "batch", change), make(name, "warp", change)
    draw = torch.Generator().manual_seed(1)
    before, there = cpu.reset(), warp.reset()
    torch.testing.assert_close(there["observation"], before["observation"], atol=1e-4, rtol=1e-4)
    observations, rewards = 0.0, 0.0
    for _ in range(steps):
        action = 2.0 * torch.rand(NUM_ENVS, cpu.action_spec.shape[-1], generator=draw) - 1.0
        same_state(warp, cpu)
        there = warp.step(there.set("action", action))["next"]
        before = cpu.step(before.set("action", action))["next"]
        scale = 1.0 + before["observation"].abs()
        off = (there["observation"] - before["observation"]).abs() / scale
        observations = max(observations, float(off.max()))
        rewards = max(rewards, float((there["reward"] - before["reward"]).abs().max()))
        for flag in ("terminated", "truncated", "diverged"):
            assert torch.equal(there[flag], before[flag])
        if before["done"].any():
            break
    return observations, rewards


@pytest.mark.parametrize("name", TASKS)
def test_a_step_is_that_of_the_cpu(name: str) -> None:
    observations, rewards = worst_of_steps(name)
    assert observations < 1e-4
    assert rewards < 1e-5


def test_contact_forces_are_those_of_the_cpu_where_the_friction_cone_has_no_edges() -> None:
    # A pyramidal one lies otherwise under capsules on the floor, see the module.
    def elliptic(model: mujoco.MjModel) -> None:
        model.opt.cone = mujoco.mjtCone.mjCONE_ELLIPTIC

    observations, rewards = worst_of_steps("Ant-v5", steps=30, change=elliptic)
    assert observations < 2e-2  # forces are felt up to 1, and stiff
    assert rewards < 1e-2


def test_saved_simulations_go_on_as_they_would_have() -> None:
    env = make("HopperStand", "warp")
    step = env.reset()
    draw = torch.Generator().manual_seed(1)
    actions = 2.0 * torch.rand(12, NUM_ENVS, 4, generator=draw) - 1.0
    for action in actions[:6]:
        step = env.step(step.set("action", action))["next"]
    saved = {name: x.clone() for name, x in env.state_dict_of_simulation().items()}

    def go_on(env: MujocoEnv) -> torch.Tensor:
        step = env.reset()
        found = []
        for action in actions[6:]:
            step = env.step(step.set("action", action))["next"]
            found.append(torch.cat((step["observation"], step["reward"]), -1))
        return torch.stack(found)

    env.load_simulation(saved)
    wanted = go_on(env)
    other = make("HopperStand", "warp", seed=5)
    other.load_simulation(saved)
    torch.testing.assert_close(go_on(other), wanted, atol=1e-5, rtol=1e-5)


def test_some_start_anew_and_the_others_go_on() -> None:
    env = make("ReacherEasy", "warp")
    step = env.reset()
    for _ in range(3):
        step = env.step(step.set("action", torch.ones(NUM_ENVS, 2)))["next"]
    position, target = env.sim.qpos.clone(), env.sim.model_field("geom_pos").clone()
    mask = torch.tensor([[False], [True], [False]])
    env.reset(step.clone().set("_reset", mask))
    moved = (env.sim.qpos != position).any(-1)
    assert moved.tolist() == [False, True, False]
    changed = (env.sim.model_field("geom_pos") != target).flatten(1).any(-1)
    assert changed.tolist() == [False, True, False]


def test_what_is_not_finite_ends_its_episode_alone() -> None:
    env = make("HopperStand", "warp")
    step = env.reset()
    env.sim.qvel[1] = float("nan")
    after = env.step(step.set("action", torch.zeros(NUM_ENVS, 4)))["next"]
    assert after["diverged"].view(-1).tolist() == [False, True, False]
    assert after["observation"].isfinite().all()
    assert after["reward"][1] == 0.0


def test_groups_set_out_from_one_state() -> None:
    env = make("HopperStand", "warp", num_envs=4, group_size=2, group_steps=3)
    env.reset()
    torch.testing.assert_close(env.sim.qpos[0], env.sim.qpos[1])
    assert not torch.equal(env.sim.qpos[0], env.sim.qpos[2])


def test_a_model_that_warp_cannot_simulate_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"env\.backend = 'warp': .*mjSOL_PGS"):
        make("Humanoid-v5", "warp")


def test_it_is_a_setting() -> None:
    settings = envs.MujocoSettings(name="CartpoleSwingup", backend="warp", num_threads=1)
    env = envs.make(settings, num_envs=2, seed=0)
    assert env.sim.dtype is torch.float32
    rollout = env.rollout(5)
    assert rollout["next", "reward"].isfinite().all()
    with pytest.raises(ConfigError, match=r"env\.backend"):
        envs.MujocoSettings(name="CartpoleSwingup", backend="wrap")
