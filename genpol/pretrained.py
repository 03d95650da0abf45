"""Models of behaviour that go from one run to another: cloned once, then finetuned or deployed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from genpol.agent import Agent
from genpol.errors import ConfigError
from genpol.nn.normalizer import RunningNormalizer
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy

MODEL_SETTINGS = ("denoiser", "solver_steps", "horizon", "actor", "normalize_observations")
"""The agent's settings that describe the model: an agent that begins from it has the same."""


@dataclass(frozen=True, kw_only=True)
class PretrainedPolicy:
    """A flow or a diffusion model of behaviour, with what must be known to go on with it.

    Attributes:
        model: The settings :data:`MODEL_SETTINGS` of the agent it was part of.
        weights: Of the model, by name.
        statistics: ``mean`` and ``std`` of the observations, ``[d]`` each, if they are
            standardised.
        observation_dim: Width of the observation.
        action_dim: Width of the action, which is in ``[-1, 1]``.
        action_steps: Actions of a chunk that were carried out before the next.
        env: The environment it was evaluated in.
        action_repeat: Simulation steps for which an action is held.
        control_period_s: Seconds from one action to the next.
        data: What it was learned from: ``name``, ``transitions``, ``updates``.
        success: How it did: ``return_mean``, perhaps ``success_mean``, ``episodes``, ``seed``.
    """

    model: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    statistics: Mapping[str, Tensor] | None
    observation_dim: int
    action_dim: int
    action_steps: int
    env: str
    action_repeat: int
    control_period_s: float
    data: Mapping[str, Any] = field(default_factory=dict)
    success: Mapping[str, Any] = field(default_factory=dict)

    def check(self, agent: Agent, control_period_s: float, where: str) -> None:
        """Refuse an environment in which this is another policy.

        Args:
            agent: Made for the environment.
            control_period_s: The environment's.
            where: The policy's name, for the message.

        Raises:
            ConfigError: With every difference.
        """
        specs = agent.specs
        pairs = (
            ("observations of width", self.observation_dim, specs.observation_dim),
            ("actions of width", self.action_dim, specs.action_dim),
            ("action_repeat", self.action_repeat, specs.action_repeat),
            ("a control period in s of", self.control_period_s, control_period_s),
        )
        differing = [
            f"{name} {own:g} (the environment: {theirs:g})"
            for name, own, theirs in pairs
            if abs(own - theirs) > 1e-6
        ]
        if differing:
            raise ConfigError(
                f"init = {where!r}: is a policy for {self.env} with {', '.join(differing)}; take "
                "the environment it was trained for, or another policy"
            )


def model_of(settings: Any, standardised: bool) -> dict[str, Any]:
    """Return :data:`MODEL_SETTINGS` of an agent's settings, as JSON can say them.

    Args:
        settings: Of the agent.
        standardised: Whether there are statistics of observations.
    """
    found = {name: getattr(settings, name) for name in MODEL_SETTINGS}
    found["actor"] = asdict(settings.actor)
    return found | {"normalize_observations": standardised}


class PolicyHolder(Agent, ABC):
    """An agent with a model of behaviour that can come from another run, and go to one."""

    @property
    @abstractmethod
    def behaviour(self) -> FlowPolicy | DiffusionPolicy:
        """The model; of one that is averaged, the average."""

    @property
    @abstractmethod
    def observation_normalizer(self) -> RunningNormalizer:
        """The statistics of the observations that the model sees."""

    def load_policy(self, policy: PretrainedPolicy) -> None:
        """Begin from this model, which the agent's settings describe.

        Raises:
            ConfigError: If the weights are those of another model.
        """
        load_model(self.behaviour, policy.weights)
        if policy.statistics is not None:
            mean, std = policy.statistics["mean"], policy.statistics["std"]
            self.observation_normalizer.set_statistics(mean, std)

    def give_policy(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Return weights and statistics as :class:`PretrainedPolicy` has them."""
        normalizer = self.observation_normalizer
        weights = {name: x.cpu().clone() for name, x in self.behaviour.state_dict().items()}
        if normalizer.count == 0:
            return weights, None
        return weights, {"mean": normalizer.mean.cpu(), "std": normalizer.std.cpu()}


def load_model(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load the weights of a model of behaviour.

    Raises:
        ConfigError: With the first name or shape that does not fit.
    """
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        details = str(error).splitlines()
        first = details[1].strip() if len(details) > 1 else details[0]
        raise ConfigError(
            f"init: the policy's weights do not fit the model that its settings describe ({first})"
        ) from None
