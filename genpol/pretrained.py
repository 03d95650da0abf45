"""Models of behaviour that go from one run to another: cloned once, then finetuned or deployed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from genpol.agent import Agent, Specs
from genpol.errors import ConfigError
from genpol.nn.normalizer import RunningNormalizer
from genpol.offline.settings import FlowSettings
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy

FIRST_MODEL_SETTINGS = ("denoiser", "solver_steps", "horizon", "actor", "normalize_observations")
"""Those of :data:`MODEL_SETTINGS` that there always were."""

MODEL_SETTINGS = (
    *FIRST_MODEL_SETTINGS,
    *("network", "time_dim", "unet", "diffusion", "time_grid", "state_clip"),
)
"""The agent's settings that describe the model: an agent that begins from it has the same."""


_PLAIN = (bool, int, float, str)
_KNOW_ALL = "bc, dppo, reinflow, ogpo, dsrl, residual and best_of_n do"


@dataclass(frozen=True, kw_only=True)
class PretrainedPolicy:
    """A flow or a diffusion model of behaviour, with what must be known to go on with it.

    Attributes:
        model: The settings :data:`MODEL_SETTINGS` of the agent it was part of.
        weights: Of the model, by name.
        statistics: ``mean`` and ``std`` of the observations, ``[d]`` each, if they are
            standardised.
        observation_clip: Bound on the absolute standardised observation; ``None`` for none.
        observation_dim: Width of the observation, with its history.
        observation_steps: Observations of the environment that it sees at once, the oldest first.
        action_dim: Width of the action, which is in ``[-1, 1]``.
        action_low: What -1 of the model means in the environment's ``[-1, 1]``, ``[A]``; ``None``
            for that.
        action_high: What 1 means, ``[A]``.
        action_steps: Actions of a chunk that were carried out before the next.
        env: The environment it was evaluated in.
        action_repeat: Simulation steps for which an action is held.
        control_period_s: Seconds from one action to the next; 0 if that is not known.
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
    observation_steps: int = 1
    observation_clip: float | None = 10.0
    action_low: Sequence[float] | None = None
    action_high: Sequence[float] | None = None

    def check(self, specs: Specs, control_period_s: float, where: str) -> None:
        """Refuse an environment in which this is another policy.

        Args:
            specs: Sizes of the environment.
            control_period_s: The environment's.
            where: The policy's name, for the message.

        Raises:
            ConfigError: With every difference.
        """
        period_s = self.control_period_s or control_period_s
        pairs = (
            ("observations of width", self.observation_dim, specs.observation_dim),
            ("actions of width", self.action_dim, specs.action_dim),
            ("action_repeat", self.action_repeat, specs.action_repeat),
            ("a control period in s of", period_s, control_period_s),
        )
        differing = [
            f"{name} {own:g} (the environment: {theirs:g})"
            for name, own, theirs in pairs
            if abs(own - theirs) > 1e-6
        ]
        if differing:
            stacked = f", with env.observation_steps={self.observation_steps}"
            raise ConfigError(
                f"init = {where!r}: is a policy for {self.env} with {', '.join(differing)}; take "
                f"the environment it was trained for{stacked * (self.observation_steps > 1)}, or "
                "another policy"
            )


def model_of(settings: Any, standardised: bool) -> dict[str, Any]:
    """Return :data:`MODEL_SETTINGS` of an agent's settings, as JSON can say them.

    Args:
        settings: Of the agent.
        standardised: Whether there are statistics of observations.

    Raises:
        ConfigError: If the model is one that an agent made for itself alone.
    """
    if settings.actor is None:
        raise ConfigError(
            "agent.actor = None: this model was not begun from a policy with init=, and squashes "
            "its actions, so that others cannot go on with it; take a run of bc or ogpo"
        )
    plain_model = FlowSettings()
    found = {name: getattr(settings, name, getattr(plain_model, name)) for name in MODEL_SETTINGS}
    found = {k: x if isinstance(x, _PLAIN) else asdict(x) for k, x in found.items()}
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
            ConfigError: If the weights are those of another model, or its actions have a range of
                their own, of which the agent knows nothing.
        """
        load_model(self.behaviour, policy.weights)
        if policy.statistics is not None:
            mean, std = policy.statistics["mean"], policy.statistics["std"]
            self.observation_normalizer.clip = policy.observation_clip
            self.observation_normalizer.set_statistics(mean, std)
        if policy.action_low is not None and policy.action_high is not None:
            self.scale_actions(torch.tensor(policy.action_low), torch.tensor(policy.action_high))

    def give_policy(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """Return weights and statistics as :class:`PretrainedPolicy` has them."""
        normalizer = self.observation_normalizer
        weights = {name: x.cpu().clone() for name, x in self.behaviour.state_dict().items()}
        # The model's own, which in some agents is the same: it would standardise twice elsewhere.
        own = RunningNormalizer(self.behaviour.normalizer.dim).state_dict()
        weights |= {f"normalizer.{name}": x for name, x in own.items()}
        if normalizer.count == 0:
            return weights, None
        return weights, {"mean": normalizer.mean.cpu(), "std": normalizer.std.cpu()}

    def scale_actions(self, low: Tensor, high: Tensor) -> None:
        """Take -1 and 1 of the model's actions for these of the environment, ``[A]``.

        Raises:
            ConfigError: If the agent has actions of the environment alone.
        """
        raise ConfigError(
            "init: the policy's actions have a range of their own (action_low and action_high in "
            f"its policy.json), which this agent does not know; {_KNOW_ALL}"
        )

    def action_range(self) -> tuple[Tensor, Tensor] | None:
        """Return what :meth:`scale_actions` was given, if that is not -1 and 1."""
        return None

    def give_bounds(self) -> dict[str, Any]:
        """Return the bounds of observations and actions as :class:`PretrainedPolicy` has them."""
        bounds: dict[str, Any] = {}
        if self.observation_normalizer.count > 0:
            clip = float(self.observation_normalizer.bound)
            bounds["observation_clip"] = clip if math.isfinite(clip) else None
        if (actions := self.action_range()) is not None:
            bounds |= {"action_low": actions[0].tolist(), "action_high": actions[1].tolist()}
        return bounds


def complete(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a model with the defaults of those that older policies do not name."""
    defaults = model_of(FlowSettings(), bool(model.get("normalize_observations")))
    found = dict(model)
    for name in MODEL_SETTINGS:
        own, default = found.get(name), defaults[name]
        if isinstance(default, Mapping) and isinstance(own, Mapping | None):
            found[name] = {**default, **(own or {})}
        else:
            found.setdefault(name, default)
    return found


def known_to(settings_class: type, model: Mapping[str, Any], agent: str) -> dict[str, Any]:
    """Return the settings of a model that an agent has, if it needs no others.

    Args:
        settings_class: Of the agent.
        model: Of :class:`PretrainedPolicy`.
        agent: The agent's name, for the message.

    Raises:
        ConfigError: If the model has a property that the agent knows nothing of.
    """
    known = {x.name for x in fields(settings_class)}
    defaults = complete({"normalize_observations": model["normalize_observations"]})
    for name, value in model.items():
        if name not in known and value != defaults.get(name):
            raise ConfigError(
                f"init: the policy's model has {name} = {value}, which agent={agent} does not "
                f"know; {_KNOW_ALL}"
            )
    return {name: value for name, value in model.items() if name in known}


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
