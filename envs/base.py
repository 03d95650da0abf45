"""What all batched environments have in common: what they declare, what a step gives, saving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Binary, Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

from genpol.errors import CheckpointError


class Outcome(NamedTuple):
    """What a step gives.

    Attributes:
        seen: What is observed, by key ``[num_envs, d]``.
        reward: ``[num_envs, 1]``, as all that follow.
        terminated: Where the task ended.
        truncated: Where an episode ended without that.
        diverged: Where physics broke down.
    """

    seen: dict[str, Tensor]
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    diverged: Tensor


def contain_divergence(
    before: Mapping[str, Tensor],
    seen: Mapping[str, Tensor],
    *,
    reward: Tensor,
    terminated: Tensor,
    truncated: Tensor,
) -> Outcome:
    """Return a step's outcome in which nothing is non-finite.

    Where an observation or the reward is, the episode ends there with ``truncated`` and
    ``diverged``, reward 0 and the last good observation.

    Args:
        before: What was observed before the step, by key ``[num_envs, d]``.
        seen: What is observed after it.
        reward: As many numbers as there are environments.
        terminated: As many truth values.
        truncated: As many.
    """
    reward = reward.view(-1, 1).float()
    sane = reward.isfinite()
    for x in seen.values():
        sane = sane & x.isfinite().all(-1, keepdim=True)
    return Outcome(
        {key: torch.where(sane, x, before[key]) for key, x in seen.items()},
        torch.where(sane, reward, 0.0),
        terminated.view(-1, 1).bool() & sane,
        truncated.view(-1, 1).bool() | ~sane,
        ~sane,
    )


class BatchedEnv(EnvBase):
    """Simulations of one kind, side by side, as a batch-locked environment ``[num_envs]``.

    Actions lie in ``[-1, 1]``. ``terminated`` and ``truncated`` are apart, and with every
    observation comes whether the physics broke down (``diverged``) and whether an episode begins
    with it (``is_init``).

    Attributes:
        name: The environment's name.
        max_episode_steps: Control steps until truncation.
        action_repeat: Control steps per call of ``step``.
        control_period_s: Seconds of simulated time per call of ``step``.
        num_diverged: Episodes that ended by divergence so far.

    Args:
        num_envs: Number of environments.
        device: Where tensors are given and taken.
    """

    batch_locked = True
    name: str
    action_repeat = 1

    def __init__(self, num_envs: int, *, device: torch.device | str) -> None:
        super().__init__(device=torch.device(device), batch_size=torch.Size([num_envs]))

    def declare(self, seen: Mapping[str, Tensor], *, action_dim: int, num_rewards: int = 1) -> None:
        """Set the specs.

        Args:
            seen: Of each key that is observed, numbers or truth values ``[num_envs, d]``.
            action_dim: Width of an action.
            num_rewards: Width of a reward.
        """
        (n,) = self.batch_size
        home: dict[str, Any] = {"device": self.device}
        flag = Binary(1, shape=(n, 1), dtype=torch.bool, **home)

        def spec(x: Tensor) -> TensorSpec:
            if x.dtype == torch.bool:
                return Binary(x.shape[-1], shape=x.shape, dtype=x.dtype, **home)
            return Unbounded(x.shape, dtype=x.dtype, **home)

        self.observation_spec = Composite(
            **{key: spec(x) for key, x in seen.items()},
            diverged=flag.clone(),
            is_init=flag.clone(),
            shape=(n,),
            **home,
        )
        self.action_spec = Bounded(-1.0, 1.0, (n, action_dim), **home)
        self.reward_spec = Unbounded((n, num_rewards), **home)
        self.full_done_spec = Composite(
            done=flag.clone(),
            terminated=flag.clone(),
            truncated=flag.clone(),
            shape=(n,),
            **home,
        )

    def output(
        self,
        seen: Mapping[str, Tensor],
        *,
        is_init: Tensor,
        diverged: Tensor | None = None,
        terminated: Tensor | None = None,
        truncated: Tensor | None = None,
        **more: Tensor,
    ) -> TensorDict:
        """Return what a reset or a step gives, in tensors that nobody else holds.

        Args:
            seen: What is observed.
            is_init: Where an episode begins ``[num_envs, 1]``.
            diverged: Where physics broke down; nowhere by default, as after a reset.
            terminated: Where the task ended.
            truncated: Where an episode ended without that.
            **more: What comes besides, such as the reward.
        """
        nowhere = torch.zeros_like(is_init)
        terminated = nowhere if terminated is None else terminated
        truncated = nowhere if truncated is None else truncated
        flags = {
            "is_init": is_init,
            "diverged": nowhere if diverged is None else diverged,
            "terminated": terminated,
            "truncated": truncated,
            "done": terminated | truncated,
        }
        return TensorDict(
            {**seen, **{name: x.clone() for name, x in flags.items()}, **more},
            self.batch_size,
            device=self.device,
        )

    def output_of(self, outcome: Outcome) -> TensorDict:
        """Return what a step gives, in tensors that nobody else holds."""
        return self.output(
            outcome.seen,
            is_init=torch.zeros_like(outcome.diverged),
            diverged=outcome.diverged,
            terminated=outcome.terminated,
            truncated=outcome.truncated,
            reward=outcome.reward,
        )

    def state_dict_of_simulation(self) -> dict[str, Tensor] | None:
        """Return None: this simulator cannot be saved; episodes restart on resuming."""
        return None

    def load_simulation(self, state: dict[str, Tensor] | None) -> None:
        """Accept None, which is all that :meth:`state_dict_of_simulation` returns.

        Raises:
            CheckpointError: If there is a state.
        """
        if state is not None:
            raise CheckpointError(
                f"environment {self.name} cannot restore a simulation: the checkpoint belongs to "
                "another environment"
            )
