"""How rollouts are collected, in training and in benchmarks alike."""

from __future__ import annotations

from tensordict.nn import TensorDictModuleBase
from torchrl.collectors import Collector
from torchrl.envs import EnvBase, ExplorationType

__all__ = ["Collector", "make_collector"]


def make_collector(env: EnvBase, policy: TensorDictModuleBase, frames_per_batch: int) -> Collector:
    """Return torchrl's collector of exploring rollouts ``[num_envs, time]``, without an end.

    Args:
        env: A batched environment, ``[num_envs]``.
        policy: Acts in it.
        frames_per_batch: Actions over all environments in one rollout.
    """
    return Collector(
        env,
        policy,
        frames_per_batch=frames_per_batch,
        total_frames=-1,
        exploration_type=ExplorationType.RANDOM,
        trust_policy=True,
        track_traj_ids=False,
        auto_register_policy_transforms=False,
    )
