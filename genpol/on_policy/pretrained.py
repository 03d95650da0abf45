"""On-policy training of a denoising model that is new, or that comes from another run.

From another run come its network, its chunks and its statistics of observations, which then stay as
they are. A chunk is one decision: the environment carries it out open loop
(:class:`genpol.envs.chunking.ChunkedEnv`), so that its action is a flattened chunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genpol import settings as check
from genpol.agent import Specs, StatefulPolicy
from genpol.nn.normalizer import RunningNormalizer
from genpol.offline.networks import make_denoiser
from genpol.offline.settings import (
    DiffusionSettings,
    FlowSettings,
    NetworkSettings,
    UnetSettings,
)
from genpol.on_policy.actors import ActorCritic
from genpol.on_policy.denoising import DenoisingPolicy, DenoisingSettings, explores
from genpol.policies.chain import Chain
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy
from genpol.policies.schedules import diffusers_schedule


class Chunking(NamedTuple):
    """How an environment takes chunks: their length, and how many actions are carried out."""

    horizon: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class PretrainedSettings(DenoisingSettings):
    """Hyper-parameters of agents whose denoising model may come from another run."""

    denoiser: str = "flow"
    """`flow` or `diffusion`."""
    horizon: int = 1
    """Actions per chunk; each chunk is one decision."""
    action_steps: int = 0
    """Actions of each chunk that are carried out before the next; 0 for all."""
    actor: NetworkSettings | None = None
    """Network of the policy of `init`; null for a new one, see `actor_hidden`."""
    normalize_observations: bool = False
    """Whether the policy of `init` has statistics of observations. A new one always has."""
    network: str = "mlp"
    """Kind of network of the policy of `init`, with the settings that follow; see agent=bc."""
    time_dim: int = 16
    """Width of the embedded time, of networks that learn it."""
    unet: UnetSettings = field(default_factory=UnetSettings)
    """What a `unet` has besides."""
    diffusion: DiffusionSettings = field(default_factory=DiffusionSettings)
    """Noise levels of the diffusion model of `init`, and how it is sampled."""
    time_grid: str = "left"
    """Times at which the flow of `init` is asked: `left` or `closed`."""
    state_clip: float = 0.0
    """Bound on the absolute states behind the steps of the flow of `init`; 0 for none."""
    clean_clip: float = 3.0
    """Bound on the clean estimate of a new diffusion model, before the squash; 0 for none."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.denoiser", self.denoiser, ("flow", "diffusion"))
        check.at_least("agent.horizon", self.horizon, 1)
        check.within("agent.action_steps", self.action_steps, 0, self.horizon - self.past_steps)
        check.at_least("agent.clean_clip", self.clean_clip, 0.0)

    @property
    def past_steps(self) -> int:
        """Actions at the end of a chunk that are not to be carried out."""
        return 0 if self.actor is None else self._model(self.actor).past_steps

    @property
    def chunking(self) -> Chunking | None:
        """How the environment takes chunks; ``None`` where there are none."""
        steps = self.action_steps or self.horizon - self.past_steps
        return None if self.horizon == 1 else Chunking(self.horizon, steps)

    def make_actor(self, specs: Specs, generator: torch.Generator) -> FlowPolicy | DiffusionPolicy:
        """Return the model, for actions that are flattened chunks."""
        width = specs.action_dim // self.horizon
        if self.actor is not None:
            model = self._model(self.actor)
            return make_denoiser(specs.observation_dim, width, model, generator)
        sizes = (specs.observation_dim, width, self.actor_hidden)
        if self.denoiser == "flow":
            return FlowPolicy(
                *sizes, horizon=self.horizon, num_steps=self.solver_steps, generator=generator
            )
        levels = self.solver_steps
        return DiffusionPolicy(
            *sizes,
            horizon=self.horizon,
            schedule=diffusers_schedule(num_levels=levels, num_steps=levels),
            sampler="ddpm",
            clip=self.clean_clip or None,
            generator=generator,
        )

    def _model(self, actor: NetworkSettings) -> FlowSettings:
        """Return the settings of the policy of `init` as agents of data sets have them."""
        names = ("denoiser", "solver_steps", "horizon", "network", "time_dim", "unet", "diffusion")
        own = {name: getattr(self, name) for name in (*names, "time_grid", "state_clip")}
        return FlowSettings(actor=actor, **own)


class PretrainedPolicyHead(DenoisingPolicy, StatefulPolicy):
    """The policy that acts with a model of behaviour: the chain's end, clipped to [-1, 1].

    Where it does not explore it draws what it begins from all the same, for that is what the model
    is; its steps then have no noise but the model's own.

    Attributes:
        action_scale: Of the model's actions, which are the environment's but for policies that come
            from elsewhere, ``[A]``.
        action_shift: Added to them, ``[A]``.

    The arguments are those of :class:`~genpol.on_policy.denoising.DenoisingPolicy`.
    """

    action_scale: Tensor
    action_shift: Tensor

    def __init__(
        self,
        actor_critic: ActorCritic,
        *,
        generator: torch.Generator,
        chain: Chain | None = None,
    ) -> None:
        super().__init__(actor_critic, generator=generator, chain=chain)
        width = self.actor.action_shape[-1]
        self.register_buffer("action_scale", torch.ones(width, device=generator.device))
        self.register_buffer("action_shift", torch.zeros(width, device=generator.device))

    def _actions(self, observation: Tensor) -> tuple[Tensor | None, Tensor]:
        assert self._chain is not None
        leading = observation.shape[:-1]
        noise, steps = self._chain.draw(leading, self._generator)
        if explores():
            states = self._chain.sample(self.actor, observation, noise, steps)
            return states, states.select(-1 - len(self._chain.action_shape), -1)
        actor = self.actor
        if isinstance(actor, DiffusionPolicy) and actor.num_draws > 1:
            return None, actor.sample(observation, noise, steps)
        return None, actor.sample(observation, noise)

    def _squash(self, decoded: Tensor) -> Tensor:
        chunk = decoded.clamp(-1.0, 1.0).unflatten(-1, (-1, len(self.action_scale)))
        return (self.action_shift + self.action_scale * chunk).clamp(-1.0, 1.0).flatten(-2)

    def start(self, seed: int) -> None:
        """See :class:`~genpol.agent.StatefulPolicy`."""
        self._generator.manual_seed(seed)

    def acting_state(self) -> dict[str, Any]:
        """See :class:`~genpol.agent.StatefulPolicy`."""
        return {"generator": self._generator.get_state()}

    def load_acting_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`~genpol.agent.StatefulPolicy`."""
        self._generator.set_state(state["generator"].cpu())


class PretrainedActions:
    """How the policy of `init` knows actions, for agents of whom it is the head."""

    policy: DenoisingPolicy

    def scale_actions(self, low: Tensor, high: Tensor) -> None:
        """Take -1 and 1 of the model's actions for these of the environment, ``[A]``."""
        assert isinstance(self.policy, PretrainedPolicyHead)
        self.policy.action_scale.copy_((high - low) / 2)
        self.policy.action_shift.copy_((high + low) / 2)

    def action_range(self) -> tuple[Tensor, Tensor] | None:
        """Return what :meth:`scale_actions` was given, if that is not -1 and 1."""
        if not isinstance(self.policy, PretrainedPolicyHead):
            return None
        scale, shift = self.policy.action_scale.cpu(), self.policy.action_shift.cpu()
        if torch.all(scale == 1) and torch.all(shift == 0):
            return None
        return shift - scale, shift + scale


def freeze_statistics(actor_critic: ActorCritic, observation_dim: int) -> None:
    """Give actor and critics statistics of observations that training leaves alone."""
    device = actor_critic.normalizer.shift.device
    actor_critic.actor.normalizer = RunningNormalizer(observation_dim).to(device)
    actor_critic.learns_statistics = False
