"""Isaac Lab's own trainers, to measure beside the library's: rsl_rl's PPO, and torchrl's.

All contenders share one simulation, of which a process can have one: the task, its environments
and the device are the same. So are the steps of a rollout, passes and minibatches over it, separate
actor and critic of the same widths, clip range, discount, lambda and gradient bound. What is not,
each library doing as it does by default:

- genpol's Gaussian has a standard deviation that depends on the observation, as that of Isaac Lab's
  torchrl trainer; rsl_rl's is one vector of parameters. genpol and rsl_rl normalise observations,
  the torchrl trainer does not.
- genpol's actor and critic have an Adam and a gradient clip each, the others one for both nets.
- Others' nets are ELU, genpol's SiLU.
- The torchrl trainer computes advantages anew in every pass. It can only be run as a whole: each
  piece of work is a training of ``TRAINING_ITERATIONS`` iterations with its own collector and log.
- genpol and the torchrl trainer keep the observation that an episode ended with, and bootstrap from
  it; rsl_rl adds the value of the step before to the reward.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch

from genpol.report.benchmark import BURN_IN, Chunk, Contender

TRAINING_ITERATIONS = 10
"""Of the torchrl trainer in one piece of work."""
_ACTIVATION = "elu"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What all contenders do alike."""

    rollout_steps: int
    """Steps of each environment between two updates."""
    epochs: int
    """Passes over a rollout."""
    minibatches: int
    """Optimiser steps per pass."""
    actor_hidden: Sequence[int]
    """Widths of the actor's hidden layers."""
    critic_hidden: Sequence[int]
    """Widths of the critic's."""
    learning_rate: float
    """Adam step size."""
    clip: float
    """Bound of the likelihood ratio's distance from 1."""
    gamma: float
    """Discount per step."""
    gae_lambda: float
    """Of generalised advantage estimation."""
    max_grad_norm: float
    """Bound of the gradient's norm."""
    device: str
    """Where physics and nets are."""


def yardsticks(open_sim: Callable[[ExitStack], Any], workload: Workload) -> list[Contender]:
    """Return the contenders that are not genpol's.

    Args:
        open_sim: Returns Isaac Lab's own environment, the same one at every call.
        workload: What they do.
    """
    table: list[tuple[str, str, Callable[..., Chunk]]] = [
        ("isaaclab-env", "Isaac Lab's environment, random actions", _stepping),
        ("rsl_rl-policy", "with rsl_rl's policy and storage", _rsl_rl_rollout),
        ("rsl_rl-learning", "rsl_rl's runner", _rsl_rl_learning),
        ("torchrl-policy", "with a policy as Isaac Lab's torchrl trainer has", _torchrl_rollout),
        ("torchrl-learning", "Isaac Lab's torchrl trainer", _torchrl_learning),
    ]

    def contender(key: str, what: str, build: Callable[..., Chunk]) -> Contender:
        return Contender(
            key=key, what=what, build=lambda cleanup: build(open_sim(cleanup), workload)
        )

    return [contender(*row) for row in table]


def _stepping(sim: Any, workload: Workload) -> Chunk:
    shape = (sim.num_envs, *sim.single_action_space.shape)
    actions = [2 * torch.rand(shape, device=sim.device) - 1 for _ in range(16)]
    sim.reset()
    index = 0

    def chunk() -> int:
        nonlocal index
        sim.step(actions[index % len(actions)])
        index += 1
        return int(sim.num_envs)

    for _ in range(BURN_IN):
        chunk()
    return chunk


def _rsl_rl_runner(sim: Any, workload: Workload) -> Any:
    from isaaclab_rl.rsl_rl import RslRlVecEnvWrapper
    from rsl_rl.runners import OnPolicyRunner

    groups = sim.single_observation_space.spaces
    hidden = {"actor": workload.actor_hidden, "critic": workload.critic_hidden}
    models: dict[str, dict[str, Any]] = {
        name: {
            "class_name": "MLPModel",
            "hidden_dims": list(widths),
            "activation": _ACTIVATION,
            "obs_normalization": True,
        }
        for name, widths in hidden.items()
    }
    models["actor"]["distribution_cfg"] = {"class_name": "GaussianDistribution", "init_std": 1.0}
    config = {
        "num_steps_per_env": workload.rollout_steps,
        "save_interval": 1_000_000,
        "obs_groups": {
            "actor": ["policy"],
            "critic": ["critic" if "critic" in groups else "policy"],
        },
        "algorithm": {
            "class_name": "PPO",
            "num_learning_epochs": workload.epochs,
            "num_mini_batches": workload.minibatches,
            "learning_rate": workload.learning_rate,
            "clip_param": workload.clip,
            "gamma": workload.gamma,
            "lam": workload.gae_lambda,
            "max_grad_norm": workload.max_grad_norm,
            "value_loss_coef": 1.0,
            "entropy_coef": 0.0,
            "use_clipped_value_loss": True,
            "schedule": "fixed",
        },
        **models,
    }
    with redirect_stdout(io.StringIO()):
        return OnPolicyRunner(RslRlVecEnvWrapper(sim), config, device=workload.device)


def _rsl_rl_rollout(sim: Any, workload: Workload) -> Chunk:
    """Return collection as rsl_rl's runner does it, its records of episodes included."""
    runner = _rsl_rl_runner(sim, workload)
    seen = runner.env.get_observations()

    def chunk() -> int:
        nonlocal seen
        with torch.inference_mode():
            for _ in range(workload.rollout_steps):
                seen, reward, done, extras = runner.env.step(runner.alg.act(seen))
                runner.alg.process_env_step(seen, reward, done, extras)
                runner.logger.process_env_step(reward, done, extras, None)
        runner.alg.storage.clear()
        return workload.rollout_steps * int(sim.num_envs)

    return _warm(chunk)


def _rsl_rl_learning(sim: Any, workload: Workload) -> Chunk:
    runner = _rsl_rl_runner(sim, workload)

    def chunk() -> int:
        with redirect_stdout(io.StringIO()):
            runner.learn(1)
        return workload.rollout_steps * int(sim.num_envs)

    return _warm(chunk)


def _torchrl_config(workload: Workload) -> Any:
    from isaaclab_rl.torchrl import TorchRlPpoCfg

    return TorchRlPpoCfg(
        device=workload.device,
        num_steps_per_env=workload.rollout_steps,
        max_iterations=TRAINING_ITERATIONS,
        save_interval=1_000_000,
        experiment_name="bench",
        actor_hidden_dims=list(workload.actor_hidden),
        critic_hidden_dims=list(workload.critic_hidden),
        activation=_ACTIVATION.upper(),
        num_learning_epochs=workload.epochs,
        num_mini_batches=workload.minibatches,
        learning_rate=workload.learning_rate,
        gamma=workload.gamma,
        lam=workload.gae_lambda,
        clip_param=workload.clip,
        max_grad_norm=workload.max_grad_norm,
    )


def _torchrl_rollout(sim: Any, workload: Workload) -> Chunk:
    from isaaclab_rl.torchrl import IsaacLabTorchRLWrapper
    from isaaclab_rl.torchrl.ppo import make_actor
    from torchrl.collectors import Collector

    env = IsaacLabTorchRLWrapper(sim)
    actor = make_actor(env, _torchrl_config(workload)).to(workload.device).eval()
    batches = iter(
        Collector(
            env,
            actor,
            frames_per_batch=workload.rollout_steps * int(sim.num_envs),
            total_frames=-1,
            device=workload.device,
            split_trajs=False,
            auto_register_policy_transforms=True,
        )
    )
    return _warm(lambda: int(next(batches).numel()))


def _torchrl_learning(sim: Any, workload: Workload) -> Chunk:
    from isaaclab_rl.torchrl import IsaacLabTorchRLWrapper, train_ppo

    env, config = IsaacLabTorchRLWrapper(sim), _torchrl_config(workload)
    # The trainer's collector closes the environment, which others go on with.
    env.close = lambda **kwargs: None

    def chunk() -> int:
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            train_ppo(env, config, folder)
        return TRAINING_ITERATIONS * workload.rollout_steps * int(sim.num_envs)

    return _warm(chunk)


def _warm(chunk: Chunk) -> Chunk:
    chunk()
    return chunk
