"""Soft actor-critic with a proximal term: what off-policy MDPO and SAC share.

Transitions come from a replay. Two critics regress ``r + gamma V(s')``; the actor minimises
:func:`~genpol.objectives.actor_critic.mdpo_actor_loss`, whose reference is a copy of itself that is
refreshed every ``reference_period`` environment steps.

With ``critic=q`` the value of the next state is ``min_i Q'_i(s', a') - lambda log pi(a'|s')`` under
Polyak-averaged critics. With ``critic=v`` it is a network of its own that regresses
``min_i Q_i(s, a) - lambda log pi(a|s)``, as MDPO's authors do; the average is then of that network,
and the actor follows ``Q_1`` alone.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn
from torchrl.envs import ExplorationType, exploration_type

from genpol import settings as check
from genpol.agent import ReplayAgent, Specs
from genpol.errors import ConfigError
from genpol.nn.ensemble import EnsembleMLP
from genpol.nn.optimizer import GuardedOptimizer
from genpol.objectives.actor_critic import (
    entropy_term,
    mdpo_actor_loss,
    soft_bellman_target,
    temperature_loss,
)
from genpol.policies.gaussian import gaussian_kl
from genpol.policies.squashed import (
    SquashedGaussianPolicy,
    SquashedSample,
    squashed_log_prob,
)


@dataclass(frozen=True, kw_only=True)
class OffPolicySettings:
    """Hyper-parameters that soft actor-critics share."""

    rollout_steps: int = 1
    """Actions of every environment between two rounds of updates."""
    updates_per_step: float = 1.0
    """Updates per action taken."""
    batch_size: int = 256
    """Transitions per update."""
    replay_capacity: int = 1_000_000
    """Transitions that the replay holds."""
    warmup_steps: int = 5_000
    """Environment steps under uniformly random actions, without updates, at the start."""
    gamma: float = 0.99
    """Discount per decision."""
    polyak: float = 0.005
    """Share of the live weights in every update of the averaged ones."""
    critic: str = "q"
    """What the target averages: the critics (`q`) or a state-value network (`v`, released MDPO)."""
    temperature: float = 0.2
    """Weight of the entropy; where it starts if it is learned."""
    learn_temperature: bool = True
    """Whether the temperature holds the entropy at `entropy_per_dimension`."""
    entropy_per_dimension: float = -1.0
    """Entropy to hold, in nats per action dimension."""
    learning_rate: float = 3e-4
    """Adam step size of the actor."""
    critic_learning_rate: float = 3e-4
    """Adam step size of the critics."""
    temperature_learning_rate: float = 3e-4
    """Adam step size of the temperature."""
    max_grad_norm: float = 100.0
    """Gradients of actor and critics are each clipped to this global norm."""
    actor_hidden: list[int] = field(default_factory=lambda: [256, 256])
    """Widths of the actor's hidden layers."""
    actor_gain: float = 1.0
    """Factor on the initial weights of the actor's last layer; with a small one it begins in the
    middle of its actions, whatever the scale of observations."""
    critic_hidden: list[int] = field(default_factory=lambda: [256, 256])
    """Widths of the critics' hidden layers."""
    reward_scale: float = 1.0
    """Rewards are multiplied by this before anything sees them."""
    nonfinite_patience: int = 10
    """Non-finite losses in a row that stop the run."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        for name in (
            *("rollout_steps", "updates_per_step", "batch_size", "replay_capacity"),
            *("learning_rate", "critic_learning_rate", "temperature_learning_rate"),
            *("max_grad_norm", "reward_scale", "polyak", "actor_gain"),
        ):
            check.positive(f"agent.{name}", getattr(self, name))
        for name in ("warmup_steps", "temperature"):
            check.at_least(f"agent.{name}", getattr(self, name), 0)
        check.at_least("agent.nonfinite_patience", self.nonfinite_patience, 1)
        if self.learn_temperature:
            check.positive("agent.temperature", self.temperature)
        check.within("agent.gamma", self.gamma, 0.0, 1.0)
        check.within("agent.polyak", self.polyak, 0.0, 1.0)
        check.widths("agent.actor_hidden", self.actor_hidden)
        check.widths("agent.critic_hidden", self.critic_hidden)
        check.one_of("agent.critic", self.critic, ("q", "v"))


@dataclass(frozen=True)
class Proximity:
    """How far one update may lead from the policy of a while ago.

    Attributes:
        kl_coefficient: ``c``; ``None`` takes the temperature, which is SAC.
        tsallis_index: ``q`` of entropy and divergence.
        reference_period: Environment steps between two copies of the actor.
        divergence: ``exact``, the KL divergence in closed form, or ``sampled``.
    """

    kl_coefficient: float | None = None
    tsallis_index: float = 1.0
    reference_period: int = 1000
    divergence: str = "exact"


class ReplayPolicy(TensorDictModuleBase):
    """The policy that acts: uniformly random in the warm-up, then the actor.

    Attributes:
        actor: The network.
        warming_up: Whether exploration is still uniform.

    Args:
        actor: The network.
        generator: Source of the exploration noise.
    """

    def __init__(self, actor: SquashedGaussianPolicy, *, generator: torch.Generator) -> None:
        super().__init__()
        self.in_keys = ["observation"]
        self.out_keys = ["action"]
        self.actor = actor
        self.warming_up = False
        self._generator = generator

    @torch.no_grad()
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``action`` ``[..., A]``."""
        observation = tensordict["observation"]
        if exploration_type() not in (ExplorationType.RANDOM, None):
            return tensordict.set("action", self.actor.mode(observation))
        noise = observation.new_empty((*observation.shape[:-1], self.actor.action_dim))
        if self.warming_up:
            return tensordict.set("action", noise.uniform_(-1, 1, generator=self._generator))
        noise.normal_(generator=self._generator)
        return tensordict.set("action", self.actor.sample(observation, noise))


class SoftActorCritic(ReplayAgent):
    """Actor, two critics and a temperature, learning from a replay.

    Args:
        settings: Hyper-parameters.
        proximity: The proximal term.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights, exploration and noise.
    """

    def __init__(
        self,
        settings: OffPolicySettings,
        proximity: Proximity,
        specs: Specs,
        *,
        device: str,
        seed: int,
    ) -> None:
        super().__init__()
        if specs.num_rewards > 1:
            raise ConfigError(
                f"env.vector_reward = True: this agent learns from one reward, not from "
                f"{specs.num_rewards} terms; leave it false, or use an on-policy agent"
            )
        self.settings = settings
        self.proximity = proximity
        self.specs = specs
        self.frames_per_batch = settings.rollout_steps * specs.num_envs
        self.batch_size = settings.batch_size
        self.replay_capacity = settings.replay_capacity
        self.gradient_steps = 0
        self.generator = torch.Generator(device).manual_seed(seed)
        actor = SquashedGaussianPolicy(
            specs.observation_dim,
            specs.action_dim,
            settings.actor_hidden,
            output_gain=settings.actor_gain,
            generator=self.generator,
        )
        self.policy = ReplayPolicy(actor.to(device), generator=self.generator)
        self.critics = self._make_critics(2, specs.observation_dim + specs.action_dim).to(device)
        self.values = (
            self._make_critics(1, specs.observation_dim).to(device)
            if settings.critic == "v"
            else None
        )
        averaged = self.critics if self.values is None else self.values
        self.averaged = copy.deepcopy(averaged).requires_grad_(False)
        self.reference = copy.deepcopy(actor).requires_grad_(False)
        self.log_temperature = nn.Parameter(
            torch.tensor(math.log(settings.temperature) if settings.temperature > 0 else -math.inf),
            requires_grad=settings.learn_temperature,
        )
        self._optimizers = self._make_optimizers()
        self._env_steps = 0
        self._updates_owed = 0.0
        self.policy.warming_up = settings.warmup_steps > 0

    def _make_critics(self, number: int, input_dim: int) -> EnsembleMLP:
        return EnsembleMLP(
            number, input_dim, 1, self.settings.critic_hidden, generator=self.generator
        )

    def _make_optimizers(self) -> dict[str, GuardedOptimizer]:
        settings = self.settings
        critics = [*self.critics.parameters()]
        if self.values is not None:
            critics += self.values.parameters()
        parts: dict[str, tuple[list[nn.Parameter], float]] = {
            "actor": ([*self.actor.parameters()], settings.learning_rate),
            "critic": (critics, settings.critic_learning_rate),
        }
        if settings.learn_temperature:
            rate = settings.temperature_learning_rate
            parts["temperature"] = ([self.log_temperature], rate)
        return {
            name: GuardedOptimizer(
                parameters,
                rate,
                max_grad_norm=settings.max_grad_norm,
                eps=1e-8,
                patience=settings.nonfinite_patience,
                name=name,
            )
            for name, (parameters, rate) in parts.items()
        }

    @property
    def actor(self) -> SquashedGaussianPolicy:
        """The policy's network."""
        return self.policy.actor

    @property
    def temperature(self) -> Tensor:
        """Weight of the entropy, a constant scalar."""
        return self.log_temperature.detach().exp()

    @property
    def kl_coefficient(self) -> Tensor:
        """``c``, which keeps its ratio to a temperature that is learned."""
        coefficient = self.proximity.kl_coefficient
        if coefficient is None:
            return self.temperature
        if self.settings.learn_temperature:
            return self.temperature * (coefficient / self.settings.temperature)
        return torch.full_like(self.temperature, coefficient)

    def observe(self, rollout: TensorDict) -> int:
        """Take note of new steps; return the updates they call for."""
        period, before = self.proximity.reference_period, self._env_steps
        if before == 0:
            self._refresh_reference()
        self._env_steps += rollout.numel() * self.specs.action_repeat
        if self._env_steps // period > before // period:
            self._refresh_reference()
        if self._env_steps <= self.settings.warmup_steps:
            return 0
        self.policy.warming_up = False
        self._updates_owed += rollout.numel() * self.settings.updates_per_step
        updates = int(self._updates_owed)
        self._updates_owed -= updates
        return updates

    def _refresh_reference(self) -> None:
        self.reference.load_state_dict(self.actor.state_dict())

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Make one update of actor, temperature, critics and average on transitions ``[B]``.

        In the order of MDPO's released code: actor first.
        """
        observation = batch["observation"]
        drawn = self.actor.draw(observation, self._noise(batch["action"]))
        metrics = self._update_actor(observation, drawn)
        metrics |= self._update_critics(batch, drawn)
        with torch.no_grad():
            source = self.critics if self.values is None else self.values
            for slow, live in zip(self.averaged.parameters(), source.parameters(), strict=True):
                slow.lerp_(live, self.settings.polyak)
        self.gradient_steps += 1
        skipped = sum(optimizer.skipped for optimizer in self._optimizers.values())
        return metrics | {"skipped_updates": torch.tensor(float(skipped))}

    def _update_actor(self, observation: Tensor, drawn: SquashedSample) -> dict[str, Tensor]:
        index = self.proximity.tsallis_index
        self.critics.requires_grad_(False)  # only the gradient of the action is wanted
        values = self._q(self.critics, observation, drawn.action)
        # The released code follows the first critic; its minimum only enters the value's target.
        value = values[0] if self.settings.critic == "v" else values.min(0).values
        old_mean, old_scale = self.reference(observation)
        old_log_prob = squashed_log_prob(old_mean, old_scale, drawn.pre_squash)
        # The squash is common to both and does not count.
        divergence = gaussian_kl(drawn.mean, drawn.scale, old_mean, old_scale)
        exact = index == 1.0 and self.proximity.divergence == "exact"
        loss = mdpo_actor_loss(
            drawn.log_prob,
            old_log_prob,
            value,
            kl_coefficient=self.kl_coefficient,
            temperature=self.temperature,
            tsallis_index=index,
            divergence=divergence if exact else None,
        )
        self._optimizers["actor"].step(loss)
        self.critics.requires_grad_(True)
        term = entropy_term(drawn.log_prob.detach(), index)
        metrics = {
            "loss/policy": loss.detach(),
            "policy/entropy": -term.mean(),
            "policy/reference_kl": divergence.detach().mean(),
            "policy/temperature": self.temperature,
        }
        if self.settings.learn_temperature:
            target = self.settings.entropy_per_dimension * self.specs.action_dim
            self._optimizers["temperature"].step(
                temperature_loss(self.log_temperature, term, target)
            )
        return metrics

    def _update_critics(self, batch: TensorDict, drawn: SquashedSample) -> dict[str, Tensor]:
        settings = self.settings
        after, observation = batch["next"], batch["observation"]
        with torch.no_grad():
            target = soft_bellman_target(
                after["reward"].squeeze(-1) * settings.reward_scale,
                after["terminated"].squeeze(-1),
                self._next_value(after["observation"]),
                settings.gamma,
            )
        values = self._q(self.critics, observation, batch["action"])
        loss = 0.5 * (values - target).square().mean(-1).sum()
        metrics = {
            "loss/critic": loss.detach(),
            "value/mean": values.detach().mean() / settings.reward_scale,
        }
        if self.values is not None:
            state_value_target = self._soft_value(self.critics, observation, drawn)
            error = self.values(observation)[0, :, 0] - state_value_target
            value_loss = 0.5 * error.square().mean()
            metrics["loss/value"] = value_loss.detach()
            loss = loss + value_loss
        self._optimizers["critic"].step(loss)
        return metrics

    def _next_value(self, observation: Tensor) -> Tensor:
        if self.values is not None:
            return self.averaged(observation)[0, :, 0]
        noise = observation.new_empty((len(observation), self.specs.action_dim))
        drawn = self.actor.draw(observation, noise.normal_(generator=self.generator))
        return self._soft_value(self.averaged, observation, drawn)

    @torch.no_grad()
    def _soft_value(
        self, critics: EnsembleMLP, observation: Tensor, drawn: SquashedSample
    ) -> Tensor:
        """Return ``min_i Q_i - lambda log_q pi``, ``[B]``."""
        term = entropy_term(drawn.log_prob, self.proximity.tsallis_index)
        lowest = self._q(critics, observation, drawn.action).min(0).values
        return lowest - self.temperature * term

    @staticmethod
    def _q(critics: EnsembleMLP, observation: Tensor, action: Tensor) -> Tensor:
        """Return action values ``[num_critics, B]``."""
        return critics(torch.cat((observation, action), dim=-1)).squeeze(-1)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.empty_like(like).normal_(generator=self.generator)

    def training_state(self) -> dict[str, Any]:
        """Return optimisers, counters and the generator."""
        return {
            "optimizers": {name: x.state_dict() for name, x in self._optimizers.items()},
            "generator": self.generator.get_state(),
            "gradient_steps": self.gradient_steps,
            "env_steps": self._env_steps,
            "updates_owed": self._updates_owed,
            "warming_up": self.policy.warming_up,
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.generator.set_state(state["generator"])
        self.gradient_steps = state["gradient_steps"]
        self._env_steps = state["env_steps"]
        self._updates_owed = state["updates_owed"]
        self.policy.warming_up = state["warming_up"]
