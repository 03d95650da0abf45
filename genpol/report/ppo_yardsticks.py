"""PPO as others run it, to measure beside the library's own: one-file code, and stable-baselines3.

What is the same for all: the task, the number of environments, the rows of a rollout, passes and
minibatches over it, so the number of optimiser steps, too; separate actor and critic of the same
widths with SiLU; Adam, clip range, discount, lambda and gradient bound; torch's threads; the
process. What is not, each library doing as it does by default:

- genpol's Gaussian has a standard deviation that depends on the observation, which doubles the
  actor's last layer; the others' is one vector of parameters. genpol normalises observations and
  adds a prior to the loss; its actor and critic have an Adam and a gradient clip each.
- The one-file code clips the value loss, and like stable-baselines3 steps one Adam for both nets.
- genpol's update and that of the one-file code contain values and advantages of the rollout;
  stable-baselines3 computes them while it collects, so its ``train()`` is spared them.
- Others get no wrapper that they can do without: no episode statistics, no normalisation, no logs,
  all of which would slow them down.
- stable-baselines3 steps its environments one by one (``DummyVecEnv``). It runs with fewer of them,
  and with four processes per core (``SubprocVecEnv``), beside that: its best counts.
- genpol and stable-baselines3 bootstrap where a time limit cuts an episode; the one-file code does
  not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Normal

from genpol.provenance import usable_cores
from genpol.report.benchmark import Chunk, Contender, SkippedError

_FEW_ENVS = 8  # a usual number where they are stepped one by one
_ENVS_PER_CORE = 4  # where each is a process
_NEVER = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What all contenders do alike."""

    task: str
    """Gymnasium's id; empty if it has none, and then only the library itself takes part."""
    num_envs: int
    """Environments stepped together."""
    rollout_steps: int
    """Steps of each between two updates."""
    epochs: int
    """Passes over a rollout."""
    minibatches: int
    """Optimiser steps per pass."""
    actor_hidden: Sequence[int]
    """Widths of the actor's hidden layers."""
    critic_hidden: Sequence[int]
    """Widths of the critic's."""
    learning_rate: float
    """Adam's step size."""
    clip: float
    """How far the likelihood ratio may leave one."""
    gamma: float
    """Discount."""
    gae_lambda: float
    """Decay of the advantage estimate."""
    max_grad_norm: float
    """Bound of the gradient's norm."""
    seed: int
    """Seed of weights, actions and environments."""

    @property
    def rows(self) -> int:
        """Rows of a rollout, ``num_envs * rollout_steps``."""
        return self.num_envs * self.rollout_steps


def yardsticks(work: Workload) -> list[Contender]:
    """Return the others, those that only update first."""
    few = min(_FEW_ENVS, work.num_envs)
    processes = min(_ENVS_PER_CORE * usable_cores(), work.num_envs)
    in_processes = partial(_sb3, work, num_envs=processes, processes=True)
    table: list[tuple[str, str, Callable[[ExitStack], Chunk]]] = [
        ("sb3-update", "stable-baselines3, PPO.train()", partial(_sb3_update, work)),
        ("cleanrl-update", "one-file PPO in cleanrl's style", partial(_one_file_update, work)),
        ("sb3-end-to-end", "stable-baselines3, DummyVecEnv", partial(_sb3, work)),
        ("sb3-subproc", f"stable-baselines3, SubprocVecEnv of {processes}", in_processes),
        (
            "sb3-few-envs",
            f"stable-baselines3, DummyVecEnv of {few}",
            partial(_sb3, work, num_envs=few),
        ),
        ("cleanrl-end-to-end", "one-file PPO, SyncVectorEnv", partial(_one_file, work)),
    ]
    return [Contender(key=key, what=what, build=build) for key, what, build in table]


# --- one-file PPO ----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """What one-file PPO learns from, time first."""

    observation: Tensor
    """Observations ``[T, N, d]``."""
    action: Tensor
    """Actions before any bound ``[T, N, A]``."""
    log_prob: Tensor
    """Their log-densities ``[T, N]``."""
    value: Tensor
    """Values ``[T, N]``."""
    reward: Tensor
    """Rewards ``[T, N]``."""
    done: Tensor
    """Ones where the step ended an episode ``[T, N]``."""
    last_observation: Tensor
    """Observations after the last step ``[N, d]``."""


class OneFilePPO(nn.Module):
    """PPO as scripts like cleanrl's ``ppo_continuous_action`` write it (Huang et al. 2022).

    One Adam for both nets, torch's ``Normal`` with one vector of log deviations, minibatches of a
    shuffled index, advantages normalised in each, clipped values, and a clipped gradient.

    Args:
        observation_dim: Width of the observation.
        action_dim: Width of the action.
        work: Sizes and step size.
    """

    def __init__(self, observation_dim: int, action_dim: int, work: Workload) -> None:
        super().__init__()
        self.work = work
        self.actor = _net(observation_dim, work.actor_hidden, action_dim, last_gain=0.01)
        self.critic = _net(observation_dim, work.critic_hidden, 1, last_gain=1.0)
        self.log_std = nn.Parameter(torch.zeros(1, action_dim))
        self.optimizer = torch.optim.Adam(self.parameters(), lr=work.learning_rate, eps=1e-5)
        self.optimizer_steps = 0

    def distribution(self, observation: Tensor) -> Normal:
        """Return the Gaussian over actions ``[B, A]`` at observations ``[B, d]``."""
        mean = self.actor(observation)
        return Normal(mean, self.log_std.expand_as(mean).exp())

    @torch.no_grad()
    def act(self, observation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return actions ``[B, A]``, log-densities ``[B]`` and values ``[B]``."""
        distribution = self.distribution(observation)
        action = distribution.sample()
        log_prob = distribution.log_prob(action).sum(1)
        return action, log_prob, self.critic(observation).flatten()

    def update(self, rollout: Rollout) -> dict[str, float]:
        """Make all passes over a rollout and return the last losses."""
        work = self.work
        advantage = self._advantage(rollout)
        rows = {
            "observation": rollout.observation.flatten(0, 1),
            "action": rollout.action.flatten(0, 1),
            "log_prob": rollout.log_prob.flatten(),
            "value": rollout.value.flatten(),
            "advantage": advantage.flatten(),
            "target": (advantage + rollout.value).flatten(),
        }
        order = np.arange(len(rows["value"]))
        size = len(order) // work.minibatches
        metrics: dict[str, float] = {}
        for _ in range(work.epochs):
            np.random.shuffle(order)
            for start in range(0, len(order), size):
                part = order[start : start + size]
                metrics = self._step({name: x[part] for name, x in rows.items()})
        return metrics

    @torch.no_grad()
    def _advantage(self, rollout: Rollout) -> Tensor:
        """Return generalised advantages ``[T, N]`` (Schulman et al. 2016), back from the end."""
        gamma, decay = self.work.gamma, self.work.gamma * self.work.gae_lambda
        next_value = self.critic(rollout.last_observation).flatten()
        advantage = torch.zeros_like(rollout.reward)
        following = torch.zeros_like(next_value)
        for t in reversed(range(len(rollout.reward))):
            alive = 1.0 - rollout.done[t]
            error = rollout.reward[t] + gamma * alive * next_value - rollout.value[t]
            following = error + decay * alive * following
            advantage[t] = following
            next_value = rollout.value[t]
        return advantage

    def _step(self, rows: dict[str, Tensor]) -> dict[str, float]:
        clip = self.work.clip
        distribution = self.distribution(rows["observation"])
        value = self.critic(rows["observation"]).flatten()
        log_ratio = distribution.log_prob(rows["action"]).sum(1) - rows["log_prob"]
        ratio = log_ratio.exp()
        with torch.no_grad():
            divergence = ((ratio - 1) - log_ratio).mean()
            outside = ((ratio - 1.0).abs() > clip).float().mean().item()
        advantage = rows["advantage"]
        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        policy_loss = torch.max(
            -advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip)
        ).mean()
        near = rows["value"] + (value - rows["value"]).clamp(-clip, clip)
        errors = torch.max((value - rows["target"]) ** 2, (near - rows["target"]) ** 2)
        value_loss = 0.5 * errors.mean()
        entropy = distribution.entropy().sum(1).mean()
        loss = policy_loss - 0.0 * entropy + 0.5 * value_loss
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters(), self.work.max_grad_norm)
        self.optimizer.step()
        self.optimizer_steps += 1
        return {
            "loss/policy": policy_loss.item(),
            "loss/value": value_loss.item(),
            "policy/approx_kl": divergence.item(),
            "policy/clip_fraction": outside,
        }


def _net(inputs: int, hidden: Sequence[int], outputs: int, *, last_gain: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((inputs, *hidden)):
        layers += [_linear(fan_in, fan_out, 2**0.5), nn.SiLU()]
    return nn.Sequential(*layers, _linear(([inputs, *hidden])[-1], outputs, last_gain))


def _linear(fan_in: int, fan_out: int, gain: float) -> nn.Linear:
    layer = nn.Linear(fan_in, fan_out)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class _Collector:
    """Fills a rollout step by step, in tensors made once."""

    def __init__(self, work: Workload, cleanup: ExitStack) -> None:
        from gymnasium.vector import AutoresetMode, SyncVectorEnv

        # An episode's end and the next start in one step: no rows that are no transitions.
        self.env = SyncVectorEnv(
            _makers(work, work.num_envs), autoreset_mode=AutoresetMode.SAME_STEP
        )
        cleanup.callback(self.env.close)
        space = self.env.single_action_space
        assert isinstance(space, gymnasium.spaces.Box)
        self._low, self._high = space.low, space.high
        self.observation_dim = int(np.prod(self.env.single_observation_space.shape or ()))
        self.action_dim = int(np.prod(space.shape))
        time = (work.rollout_steps, work.num_envs)
        self._rollout = {
            "observation": torch.zeros(*time, self.observation_dim),
            "action": torch.zeros(*time, self.action_dim),
            **{name: torch.zeros(time) for name in ("log_prob", "value", "reward", "done")},
        }
        self._observation = torch.Tensor(self.env.reset(seed=work.seed)[0])

    def collect(self, agent: OneFilePPO) -> Rollout:
        rollout = self._rollout
        for t in range(len(rollout["reward"])):
            rollout["observation"][t] = self._observation
            action, rollout["log_prob"][t], rollout["value"][t] = agent.act(self._observation)
            rollout["action"][t] = action
            bounded = np.clip(action.numpy(), self._low, self._high)
            observation, reward, terminated, truncated, _ = self.env.step(bounded)
            rollout["reward"][t] = torch.tensor(reward)
            rollout["done"][t] = torch.Tensor(np.logical_or(terminated, truncated))
            self._observation = torch.Tensor(observation)
        return Rollout(**rollout, last_observation=self._observation)


def _one_file_parts(work: Workload, cleanup: ExitStack) -> tuple[OneFilePPO, _Collector]:
    torch.manual_seed(work.seed)
    collector = _Collector(work, cleanup)
    return OneFilePPO(collector.observation_dim, collector.action_dim, work), collector


def _one_file_update(work: Workload, cleanup: ExitStack) -> Chunk:
    agent, collector = _one_file_parts(work, cleanup)
    rollout = collector.collect(agent)

    def chunk() -> int:
        agent.update(rollout)
        return work.rows

    chunk()
    return chunk


def _one_file(work: Workload, cleanup: ExitStack) -> Chunk:
    agent, collector = _one_file_parts(work, cleanup)

    def chunk() -> int:
        agent.update(collector.collect(agent))
        return work.rows

    chunk()
    return chunk


def _makers(work: Workload, num_envs: int) -> list[Callable[[], gymnasium.Env[Any, Any]]]:
    if not work.task:
        raise SkippedError("the task is not one of gymnasium's")
    return [partial(gymnasium.make, work.task)] * num_envs


# --- stable-baselines3 -----------------------------------------------------------------------


def _sb3_model(
    work: Workload, cleanup: ExitStack, *, num_envs: int | None = None, processes: bool = False
) -> Any:
    """Return stable-baselines3's PPO on ``num_envs`` environments, after its first update.

    With fewer environments the rollout is as much longer, so that it has as many rows.
    """
    try:
        from stable_baselines3 import PPO
        from stable_baselines3.common.logger import Logger
        from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
    except ImportError:
        reason = "stable-baselines3 is not installed: pip install 'genpol[bench]'"
        raise SkippedError(reason) from None
    num_envs = num_envs or work.num_envs
    if work.rows % num_envs:
        raise SkippedError(f"{num_envs} environments do not divide {work.rows} rows")
    makers = _makers(work, num_envs)
    env: VecEnv = SubprocVecEnv(makers) if processes else DummyVecEnv(makers)
    cleanup.callback(env.close)
    model = PPO(
        "MlpPolicy",
        env,
        learning_rate=work.learning_rate,
        n_steps=work.rows // num_envs,
        batch_size=work.rows // work.minibatches,
        n_epochs=work.epochs,
        gamma=work.gamma,
        gae_lambda=work.gae_lambda,
        clip_range=work.clip,
        max_grad_norm=work.max_grad_norm,
        policy_kwargs={
            "net_arch": {"pi": list(work.actor_hidden), "vf": list(work.critic_hidden)},
            "activation_fn": nn.SiLU,
        },
        seed=work.seed,
        device="cpu",
    )
    model.set_logger(Logger(folder=None, output_formats=[]))  # else each call makes a folder
    model.learn(work.rows, log_interval=_NEVER)
    return model


def _sb3_update(work: Workload, cleanup: ExitStack) -> Chunk:
    model = _sb3_model(work, cleanup)

    def chunk() -> int:
        model.train()
        return work.rows

    return chunk


def _sb3(
    work: Workload, cleanup: ExitStack, *, num_envs: int | None = None, processes: bool = False
) -> Chunk:
    model = _sb3_model(work, cleanup, num_envs=num_envs, processes=processes)

    def chunk() -> int:
        model.learn(work.rows, reset_num_timesteps=False, log_interval=_NEVER)
        return work.rows

    return chunk
