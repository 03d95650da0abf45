"""What every environment promises, whatever simulates it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch
from _pytest.mark import ParameterSet
from tensordict import TensorDict
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import RandomPolicy, check_env_specs

from genpol import envs
from genpol.envs import (
    DMControlSettings,
    GymSettings,
    IsaacLabSettings,
    MetaWorldSettings,
    MjlabSettings,
    MujocoSettings,
    OGBenchSettings,
    Settings,
)
from genpol.envs.mujoco import simulation
from genpol.envs.mujoco.env import MujocoEnv
from genpol.errors import ConfigError

FAMILIES: dict[str, tuple[Settings, int]] = {
    "HopperStand": (MujocoSettings(name="HopperStand"), 4),
    "CartpoleSwingup": (MujocoSettings(name="CartpoleSwingup"), 4),
    "InvertedPendulum-v5": (MujocoSettings(name="InvertedPendulum-v5"), 4),
    "Ant-v5": (MujocoSettings(name="Ant-v5"), 3),
    "gym": (GymSettings(), 1),
    "gym-workers": (GymSettings(), 2),
    "dm_control": (DMControlSettings(), 1),
    "dm_control-workers": (DMControlSettings(), 2),
    "ogbench": (OGBenchSettings(goal_conditioned=True), 1),
    "ogbench-workers": (OGBenchSettings(name="puzzle-3x3"), 2),
    "metaworld": (MetaWorldSettings(), 1),
    "isaaclab": (IsaacLabSettings(), 4),
    "isaaclab-critic": (IsaacLabSettings(task="quadruped"), 3),
    "mjlab": (MjlabSettings(task="Mjlab-Cartpole-Swingup"), 4),
}
MARKS = {
    "ogbench-workers": pytest.mark.slow,  # its model takes seconds to compile, in every worker
    "metaworld": pytest.mark.metaworld,
    "isaaclab": pytest.mark.isaaclab,
    "isaaclab-critic": pytest.mark.isaaclab,
    "mjlab": pytest.mark.mjlab,
}


def parameters(names: Iterable[str]) -> list[ParameterSet]:
    return [pytest.param(name, marks=MARKS.get(name, ())) for name in names]


MANY = parameters(name for name, (_, num_envs) in FAMILIES.items() if num_envs > 1)
NATIVE = [name for name, (settings, _) in FAMILIES.items() if isinstance(settings, MujocoSettings)]


@pytest.fixture(scope="module")
def env(request: pytest.FixtureRequest) -> Iterator[EnvBase]:
    settings, num_envs = FAMILIES[request.param]
    if isinstance(settings, OGBenchSettings):
        pytest.importorskip("ogbench", reason="needs the extra genpol[ogbench]")
    if isinstance(settings, MetaWorldSettings):
        pytest.importorskip("metaworld", reason="needs Meta-World: make test-metaworld")
    if isinstance(settings, MjlabSettings):
        pytest.importorskip("mjlab", reason="needs mjlab: make test-mjlab")
    if isinstance(settings, IsaacLabSettings):
        pytest.importorskip("isaaclab", reason="needs Isaac Lab: make test-isaaclab")
        # Those to evaluate in live in a process of their own, where clocks cannot be set.
        from genpol.envs.isaaclab.env import IsaacLabEnv

        made = IsaacLabEnv(settings, num_envs=num_envs, seed=0)
    else:
        made = envs.make(settings, num_envs=num_envs, seed=0)
    yield made
    made.close()


every_family = pytest.mark.parametrize("env", parameters(FAMILIES), indirect=True)


def native(name: str, *, num_envs: int = 4, seed: int = 0, num_threads: int = 0) -> MujocoEnv:
    settings = MujocoSettings(name=name, num_threads=num_threads)
    made = envs.make(settings, num_envs=num_envs, seed=seed)
    assert isinstance(made, MujocoEnv)
    return made


def actions(env: EnvBase, steps: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return scale * (2 * torch.rand(steps, *env.action_spec.shape, generator=generator) - 1)


def act(env: EnvBase, action: Tensor) -> TensorDict:
    return env.step(TensorDict({"action": action}, env.batch_size))["next"]


def run(
    env: EnvBase, sequence: Tensor, *, seed: int | None = None, reset_first_at: int = -1
) -> TensorDict:
    """Step through ``sequence``, resetting what is done, and return every step's outcome."""
    if seed is not None:
        env.set_seed(seed)
        env.reset()
    outcomes = []
    for step, action in enumerate(sequence):
        outcomes.append(act(env, action))
        mask = outcomes[-1]["done"].clone()
        mask[0] |= step == reset_first_at
        if mask.any():
            env.reset(TensorDict({"_reset": mask}, env.batch_size))
    return torch.stack(outcomes)


def assert_equal(a: TensorDict, b: TensorDict) -> None:
    keys = ("observation", "reward", "done", "terminated", "truncated", "diverged", "is_init")
    for key in keys:
        torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)


@every_family
def test_specs_hold(env: EnvBase) -> None:
    check_env_specs(env)


@every_family
def test_attributes_and_shapes(env: EnvBase) -> None:
    (n,) = env.batch_size
    outcome = run(env, actions(env, 1), seed=0)[0]
    assert outcome["observation"].dtype == outcome["reward"].dtype == torch.float32
    assert outcome["observation"].shape == env.observation_spec["observation"].shape
    assert env.action_spec.dtype == torch.float32
    for key in ("reward", "done", "terminated", "truncated", "diverged", "is_init"):
        assert outcome[key].shape == (n, 1)
        assert outcome[key].dtype == (torch.float32 if key == "reward" else torch.bool)
    assert isinstance(env.max_episode_steps, int)
    assert env.max_episode_steps > 1
    assert env.action_repeat == 1
    assert 0 < env.control_period_s < 1
    assert env.name


@every_family
def test_extreme_actions_reach_the_bounds(
    env: EnvBase, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    env.reset()
    taken = []
    settings = FAMILIES[request.node.callspec.params["env"]][0]
    if isinstance(env, MujocoEnv):
        low, high = torch.from_numpy(env.task.model.actuator_ctrlrange.copy()).unbind(-1)
    elif isinstance(settings, IsaacLabSettings):
        low, high = torch.tensor([-1.0]), torch.tensor([1.0])
        sim_step = env.sim.step
        monkeypatch.setattr(env.sim, "step", lambda x: taken.append(x) or sim_step(x))
    else:
        inner = env._inner
        bound = 2.0 if isinstance(settings, GymSettings) else 1.0
        low, high = torch.tensor([-bound]), torch.tensor([bound])
        step = inner.step
        monkeypatch.setattr(inner, "step", lambda td: taken.append(td["action"]) or step(td))
    for action, bound in ((-1.0, low), (1.0, high), (7.0, high)):
        act(env, torch.full(env.action_spec.shape, action))
        control = env.sim.ctrl if isinstance(env, MujocoEnv) else taken[-1]
        assert (control == bound).all()


@every_family
def test_time_limit_truncates_and_next_is_the_true_last_observation(env: EnvBase) -> None:
    sequence = actions(env, 3, scale=0.1)
    env.set_seed(3)
    root = env.reset()
    env._elapsed[0] = env.max_episode_steps - 3
    expected = [act(env, action) for action in sequence]  # never reset
    env.set_seed(3)
    root = env.reset()
    env._elapsed[0] = env.max_episode_steps - 3
    for step, action in enumerate(sequence):
        outcome, root = env.step_and_maybe_reset(root.set("action", action))
        assert_equal(outcome["next"], expected[step])
        last = step == 2
        assert outcome["next", "truncated"][0].item() is last
        assert outcome["next", "done"][0].item() is last
        assert not outcome["next", "terminated"].any()
        same = (root["observation"] == outcome["next", "observation"]).all(-1)
        assert same[0].item() is not last  # after the last step, the root is a new start
        assert same[1:].all()
        assert not root["done"].any()
    assert env._elapsed[0] == 0


@every_family
def test_first_observations_of_episodes_are_marked(env: EnvBase) -> None:
    root = env.reset()
    first = []
    for step, action in enumerate(actions(env, 3, scale=0.1)):
        first.append(root["is_init"].view(-1).tolist())
        env._elapsed[0] = env.max_episode_steps - 1 if step == 1 else 0
        outcome, root = env.step_and_maybe_reset(root.set("action", action))
        assert not outcome["next", "is_init"].any()
    (n,) = env.batch_size
    assert first == [[True] * n, [False] * n, [True] + [False] * (n - 1)]


@every_family
def test_equal_seeds_give_equal_rollouts(env: EnvBase) -> None:
    sequence = actions(env, 20)
    first, again, other = (run(env, sequence, seed=seed) for seed in (1, 1, 2))
    assert_equal(first, again)
    assert (first["observation"] != other["observation"]).any()


@every_family
def test_environments_of_a_batch_differ(env: EnvBase) -> None:
    observation = run(env, actions(env, 1), seed=1)["observation"][0]
    assert len(observation.unique(dim=0)) == len(observation)


@pytest.mark.parametrize("env", MANY, indirect=True)
def test_masked_reset_leaves_the_others_alone(env: EnvBase) -> None:
    sequence = actions(env, 12, scale=0.01)  # gently: an end would draw another start
    untouched = run(env, sequence, seed=4)
    masked = run(env, sequence, seed=4, reset_first_at=5)
    assert_equal(untouched[:, 1:], masked[:, 1:])
    assert (untouched["observation"][6, 0] != masked["observation"][6, 0]).any()


@every_family
def test_collector_gathers_episodes(env: EnvBase) -> None:
    (n,) = env.batch_size
    collector = Collector(
        env, RandomPolicy(env.action_spec), frames_per_batch=n * 5, total_frames=n * 10
    )
    batches = [batch.clone() for batch in collector]
    collector.shutdown(close_env=False)
    assert [batch.shape for batch in batches] == [(n, 5), (n, 5)]
    assert batches[0]["is_init"][:, 0].all()
    ended = torch.cat([batch["next", "done"] for batch in batches], 1)[:, :-1]
    begun = torch.cat([batch["is_init"] for batch in batches], 1)[:, 1:]
    assert (begun == ended).all()
    for batch in batches:
        done = batch["next", "done"][:, :-1]
        follows = batch["observation"][:, 1:] == batch["next", "observation"][:, :-1]
        assert (follows.all(-1, keepdim=True) | done).all()
        assert not batch["next", "diverged"].any()


@pytest.mark.parametrize("name", ["HopperStand", "Ant-v5"])
def test_threads_do_not_matter(name: str) -> None:
    runs = []
    for num_threads in (1, 3):
        env = native(name, num_envs=7, num_threads=num_threads)
        runs.append(run(env, actions(env, 25), seed=0))
    assert_equal(*runs)


@pytest.mark.parametrize("name", ["HopperStand", "CheetahRun", "InvertedPendulum-v5"])
def test_own_data_do_not_matter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = native(name)
    monkeypatch.setattr(simulation, "_PERSISTENT_BYTES", 0)
    shared = native(name)
    assert kept.sim.persistent
    assert not shared.sim.persistent
    sequence = actions(kept, 25)
    for env in kept, shared:
        env._elapsed[1] = env.max_episode_steps - 5  # one of them is reset on the way
    assert_equal(run(kept, sequence), run(shared, sequence))


@pytest.mark.parametrize("name", [*NATIVE, "Humanoid-v5", "Reacher-v5", "FingerTurnHard"])
def test_simulation_continues_bit_for_bit(name: str) -> None:
    env = native(name)
    run(env, actions(env, 10), seed=0)
    env._elapsed[1] = env.max_episode_steps - 5  # ends, and draws a start, after the state is kept
    state = {key: value.clone() for key, value in env.state_dict_of_simulation().items()}
    sequence = actions(env, 15)
    expected = run(env, sequence)
    other = native(name, seed=8)
    run(other, sequence[:3], seed=8)
    other.load_simulation(state)
    torch.testing.assert_close(other.reset()["observation"], state["observation"], rtol=0, atol=0)
    assert_equal(run(other, sequence), expected)


@pytest.mark.parametrize("kept", [True, False])
def test_a_restored_observation_is_initial_only_if_it_was(kept: bool) -> None:
    env = native("HopperStand")
    run(env, actions(env, 3), seed=0, reset_first_at=2)
    state = env.state_dict_of_simulation()
    if not kept:  # a checkpoint of before the key was there
        del state["is_init"]
    other = native("HopperStand")
    other.load_simulation(state)
    assert other.reset()["is_init"].view(-1).tolist() == [True, False, False, False]
    assert other.reset()["is_init"].all()


@pytest.mark.parametrize("poison", [float("nan"), 1e30])
@pytest.mark.parametrize("name", ["HopperStand", "HalfCheetah-v5", "Ant-v5", "Pusher-v5"])
def test_divergence_is_contained(name: str, poison: float) -> None:
    env, untouched = native(name), native(name)
    sequence = actions(env, 12, scale=0.1)
    before = run(env, sequence[:4], seed=0)[-1]
    run(untouched, sequence[:4], seed=0)
    env.sim.qvel[3, 0] = poison
    outcome, expected = act(env, sequence[4]), act(untouched, sequence[4])
    assert outcome["diverged"].view(-1).tolist() == [False, False, False, True]
    assert outcome["truncated"][3]
    assert outcome["done"][3]
    assert not outcome["terminated"][3]
    assert outcome["reward"][3] == 0
    assert (outcome["observation"][3] == before["observation"][3]).all()
    assert env.num_diverged == 1
    assert_equal(outcome[:3], expected[:3])
    root = env.reset(TensorDict({"_reset": outcome["done"]}, env.batch_size))
    assert root["observation"].isfinite().all()
    after, expected = run(env, sequence[5:]), run(untouched, sequence[5:])
    assert after["observation"].isfinite().all()
    assert not after["diverged"].any()
    assert_equal(after[:, :3], expected[:, :3])


def test_explosion_in_the_last_substep_is_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    env = native("HopperStand")
    env.reset()

    def explode(sim: object) -> None:  # MuJoCo would notice in the next step only
        env.sim.qvel[2, 0] = 1e20

    monkeypatch.setattr(env.task, "after_step", explode)
    outcome = act(env, torch.zeros(env.action_spec.shape))
    assert outcome["diverged"].view(-1).tolist() == [False, False, True, False]
    assert outcome["observation"].abs().max() < 1e10


def test_termination_is_not_truncation() -> None:
    env = native("InvertedPendulum-v5")
    env.reset()
    outcome = run(env, torch.ones(40, *env.action_spec.shape))
    ended = outcome["done"].any(-1).any(-1)
    assert ended.any()
    assert (outcome["terminated"] == outcome["done"]).all()
    assert not outcome["truncated"].any()


def test_staggered_episodes_end_apart() -> None:
    env = envs.make(MujocoSettings(name="Reacher-v5"), num_envs=16, seed=0, training=True)
    env.reset()
    done = run(env, actions(env, env.max_episode_steps))["done"].squeeze(-1)
    first_end = done.int().argmax(0)
    assert done.any(0).all()
    assert len(first_end.unique()) > 4
    assert (done.sum(0) == 1).all()  # later episodes have full length


def test_training_episodes_can_be_shorter() -> None:
    settings = MujocoSettings(name="HopperStand", train_episode_steps=6, action_repeat=2)
    env = envs.make(settings, num_envs=16, seed=0, training=True)
    env.reset()
    outcome = run(env, actions(env, 9))
    done = outcome["done"].squeeze(-1)
    assert (done.sum(0) == 3).all()  # three decisions an episode, the first anywhere within
    assert (outcome["truncated"] == outcome["done"]).all()
    assert envs.make(settings, num_envs=1, seed=0).max_episode_steps == 1000


@pytest.mark.parametrize(
    ("steps", "repeat", "message"),
    [
        (2000, 1, "env.train_episode_steps = 2000: must be at most the 1000 steps"),
        (25, 2, "env.action_repeat = 2: must divide the 25 steps"),
    ],
)
def test_impossible_episodes_are_refused(steps: int, repeat: int, message: str) -> None:
    settings = MujocoSettings(train_episode_steps=steps, action_repeat=repeat)
    with pytest.raises(ConfigError, match=message):
        envs.make(settings, num_envs=1, seed=0, training=True)


def test_old_mujoco_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mujoco.batch", None)
    with pytest.raises(ConfigError, match=r"need mujoco >= 3\.17, found .*pip install 'mujoco>="):
        native("HopperStand")
