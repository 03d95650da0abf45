"""Critics of a pretrained policy's chunks, learned from what it does.

From windows of H transitions of the replay, with ``R = sum_k gamma^k r_k`` and m = 0 behind a
terminated one, an ensemble regresses ``R + gamma^H m Agg_i Q'_i(s_H, a')``, where Q' are the
averaged critics and a' chunks that the policy makes at ``s_H``. Windows may begin anywhere, not
only where a chunk was planned. What becomes of the policy is the subclass's.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.envs import ExplorationType, exploration_type

from genpol.agent import ReplayAgent, Specs
from genpol.data.windows import WindowSpec
from genpol.errors import ConfigError
from genpol.finetuning.settings import FinetuneSettings
from genpol.nn.compiling import compiled
from genpol.nn.normalizer import RunningNormalizer
from genpol.nn.optimizer import GuardedOptimizer
from genpol.objectives.critic_groups import sample_mean
from genpol.objectives.value_learning import aggregate, critic_loss
from genpol.offline.chunk_agent import ChunkAgent, Windows
from genpol.offline.networks import Critic, make_denoiser
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy
from genpol.pretrained import PolicyHolder, PretrainedPolicy

Parts = dict[str, tuple[Sequence[nn.Parameter], float]]
"""Parameters that an optimiser trains, and its step size, by name."""


class FinetuningAgent(ChunkAgent, ReplayAgent, PolicyHolder):
    """A pretrained policy, and an ensemble of critics of its chunks.

    Attributes:
        actor: The pretrained model; a subclass may train it.
        critic: The ensemble.
        averaged: Its running average, which makes the targets.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
        successes: Windows of successful episodes per update; see
            :class:`~genpol.agent.ReplayAgent`.

    Raises:
        ConfigError: If successes are asked for that the environment does not tell.
    """

    settings: FinetuneSettings
    window: WindowSpec

    def __init__(
        self,
        settings: FinetuneSettings,
        specs: Specs,
        *,
        device: str,
        seed: int,
        successes: int = 0,
    ) -> None:
        if specs.num_rewards > 1:
            raise ConfigError(
                f"env.vector_reward = True: this agent learns from one reward, not from "
                f"{specs.num_rewards} terms; leave it false"
            )
        if successes > 0 and not specs.tells_success:
            raise ConfigError(
                "agent.bc_weight: successful episodes are imitated, but this environment does not "
                "tell success; set agent.bc_weight=0, or agent.preset=ogpo"
            )
        window = WindowSpec(steps=settings.horizon, gamma=settings.gamma)
        super().__init__(settings, specs, window=window, device=device, seed=seed)
        self.successes = successes
        self.actor = make_denoiser(
            specs.observation_dim, specs.action_dim, settings, self.generator
        )
        self.critic = self.make_critic()
        self.averaged = copy.deepcopy(self.critic).requires_grad_(False)
        self._policy_given = False

    def make_critic(self, num_members: int = 0) -> Critic:
        """Return a new ensemble of critics of chunks, of the settings' size by default."""
        settings, specs = self.settings, self.specs
        return Critic(
            specs.observation_dim,
            specs.action_dim,
            settings.horizon,
            settings.critic,
            num_members=num_members or settings.num_critics,
            generator=self.generator,
        )

    def begin(self) -> None:
        """Move all networks to their device, and make the optimisers and the policy that acts."""
        self.place(plan_steps=self.settings.horizon)
        self._critic_loss = self.compiled(self.critic_loss)
        self._optimizers = {
            name: self._optimizer(name, *part) for name, part in self.parts().items()
        }

    def compiled(self, function: Any) -> Any:
        """Return a function of tensors, compiled if the settings ask for it."""
        return compiled(function, name="agent.compile") if self.settings.compile else function

    def parts(self) -> Parts:
        """Return what is trained, each with an optimiser of its own, and their step sizes."""
        return {"critic": ([*self.critic.parameters()], self.settings.critic_learning_rate)}

    def _optimizer(
        self, name: str, parameters: Sequence[nn.Parameter], rate: float
    ) -> GuardedOptimizer:
        return GuardedOptimizer(
            parameters,
            rate,
            max_grad_norm=self.settings.max_grad_norm,
            eps=1e-8,
            patience=self.settings.nonfinite_patience,
            name=name,
        )

    @property
    def warming_up(self) -> bool:
        """Whether nothing has been learned yet."""
        return self._env_steps <= self.settings.online_warmup_steps

    # --- acting --------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`~genpol.offline.chunk_agent.ChunkAgent`."""
        explore = exploration_type() in (ExplorationType.RANDOM, None)
        return self.choose(self.encode(observation), generator, explore=explore)

    @abstractmethod
    def choose(self, observation: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        """Return the chunks ``[B, H, A]`` to carry out.

        Args:
            observation: As the networks see it, ``[B, d]``.
            generator: Source of all noise.
            explore: Whether this is to gather experience.
        """

    # --- learning ------------------------------------------------------------------------------

    @abstractmethod
    def next_chunks(self, observation: Tensor) -> Tensor:
        """Return what the policy may do at next states ``[B, d]``: chunks ``[n, B, H, A]``."""

    def next_value(self, observation: Tensor) -> Tensor:
        """Return the averaged critics' word on next states ``[B, d]``, ``[B]``."""
        values = self.averaged(observation, self.next_chunks(observation)).transpose(0, 1)
        return self.combine(sample_mean(values, how=self.settings.target_sample_mean))

    def combine(self, values: Tensor) -> Tensor:
        """Combine an ensemble's values ``[M, B]`` as targets do, ``[B]``."""
        if self.settings.target != "subset":
            return aggregate(values, self.settings.target)
        pair = torch.randperm(len(values), generator=self.generator, device=values.device)[:2]
        return values[pair].amin(0)

    def critic_loss(self, batch: Windows, following: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the ensemble's regression onto ``R + discount * following``, and metrics.

        Args:
            batch: Windows ``[B]``.
            following: Values of the states behind them, ``[B]``.
        """
        target = batch["reward"] + batch["discount"] * following
        action, weight = batch["action"], batch["weight"]
        if self.settings.partial_windows:
            action = torch.where(batch["valid"].unsqueeze(-1), action, 0.0)
            weight = batch["valid"][:, 0].to(weight.dtype)  # nothing is known of a broken start
        values = self.critic(self.encode(batch["observation"]), action)
        loss = critic_loss(values, target, weight)
        spread = values.detach().std(0).mean() if len(values) > 1 else values.new_zeros(())
        return loss, {
            "loss/critic": loss.detach(),
            "value/mean": values.detach().mean(),
            "value/ensemble_std": spread,
        }

    def update_critic(self, batch: Windows) -> dict[str, Tensor]:
        """Take one step of the critics, and of their average."""
        with torch.no_grad():
            following = self.next_value(self.encode(batch["next", "observation"]))
        loss, metrics = self._critic_loss(batch, following)
        metrics |= self._optimizers["critic"].step(loss)
        follow(self.averaged, self.critic, self.settings.polyak)
        return metrics

    def update_policy(self, batch: Windows, successful: Windows) -> dict[str, Tensor]:
        """Take one step of the policy; by default there is nothing to learn.

        Args:
            batch: Windows ``[B]`` from anywhere.
            successful: Windows of successful episodes; none before there are enough of them.
        """
        return {}

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Make one update on windows ``[B]``, with those of successful episodes behind."""
        windows = self.windows(batch)
        anywhere = {key: x[: self.batch_size] for key, x in windows.items()}
        successful = {key: x[self.batch_size :] for key, x in windows.items()}
        metrics = self.learn(anywhere, successful)
        self.gradient_steps += 1
        return metrics

    def learn(self, anywhere: Windows, successful: Windows) -> dict[str, Tensor]:
        """Update the critics, and then the policy if it is its turn."""
        metrics = self.update_critic(anywhere)
        return metrics | self.policy_turn(anywhere, successful)

    def policy_turn(self, anywhere: Windows, successful: Windows) -> dict[str, Tensor]:
        """Update the policy if it is its turn."""
        if self.gradient_steps % self.settings.policy_period > 0:
            return {}
        return self.update_policy(anywhere, successful)

    # --- the pretrained policy -----------------------------------------------------------------

    @property
    def behaviour(self) -> FlowPolicy | DiffusionPolicy:
        """See :class:`~genpol.pretrained.PolicyHolder`."""
        return self.actor

    @property
    def observation_normalizer(self) -> RunningNormalizer:
        """See :class:`~genpol.pretrained.PolicyHolder`."""
        return self.normalizer

    def load_policy(self, policy: PretrainedPolicy) -> None:
        """See :class:`~genpol.pretrained.PolicyHolder`."""
        super().load_policy(policy)
        self._policy_given = True

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load all weights, as of a checkpoint, in which there is a policy."""
        self._policy_given = True
        return super().load_state_dict(*args, **kwargs)

    def check_ready(self) -> None:
        """See :class:`~genpol.agent.Agent`.

        Raises:
            ConfigError: If there is no policy to finetune.
        """
        if not self._policy_given:
            raise ConfigError(
                "this agent finetunes a policy: add init=<policy folder, run of bc, or one of "
                "`genpol policies list`>"
            )

    def training_state(self) -> dict[str, Any]:
        """Return the optimisers' states, and what :class:`ChunkAgent` has."""
        states = {name: optimizer.state_dict() for name, optimizer in self._optimizers.items()}
        return super().training_state() | {"optimizers": states}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""
        super().load_training_state(state)
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])


@torch.no_grad()
def follow(slow: nn.Module, live: nn.Module, share: float) -> None:
    """Move the parameters of an average by this share towards those it follows."""
    for average, new in zip(slow.parameters(), live.parameters(), strict=True):
        average.lerp_(new, share)
