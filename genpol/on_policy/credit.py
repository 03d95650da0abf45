"""What each step of a rollout was worth: advantages, and targets of the critics."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from genpol.agent import Specs
from genpol.data.episodes import EpisodeTracker, FinishedEpisodes
from genpol.errors import ConfigError
from genpol.objectives.advantages import (
    QuantileTracker,
    brax_gae,
    dvao,
    gae,
    gdpo,
    group_relative,
    group_std,
    mixed_value_at_risk,
)
from genpol.objectives.selection import pipo_coefficients
from genpol.on_policy.settings import OnPolicySettings

# Interquartile range of so many returns scales the steps of the tracked quantiles.
_RISK_WINDOW = 100
# Decay of the running standard deviations that weigh reward terms (DVAO).
_STD_DECAY = 0.9


@dataclass(frozen=True)
class Worth:
    """What the steps of a rollout were worth, ``[num_envs, time, ...]``.

    Attributes:
        advantage: Of each step.
        target: Estimates of the scaled return, ``[..., K]``.
        valid: Steps to learn from.
        centred: The advantage counted from the group's median; ``None`` without groups.
        risk: What is added to the normalised advantage; ``None`` without a risk measure.
        feedback: What PIPO repeats or undoes, where that is not the normalised advantage.
        returns: Undiscounted, unscaled returns of the episodes that ended, ``[E]``, terms weighted
            as the settings say; empty where nothing asks for them.
    """

    advantage: Tensor
    target: Tensor
    valid: Tensor
    centred: Tensor | None
    risk: Tensor | None
    feedback: Tensor | None
    returns: Tensor


class Credit:
    """Estimates advantages from rewards and values.

    * ``advantage=gae | brax`` sums temporal differences (see
      :mod:`genpol.objectives.advantages`). Of a reward of several terms, either the weighted sum is
      learned from (``combine=sum``), or each term has a value and an advantage of its own, and
      these are combined (``gdpo``, ``dvao``).
    * ``advantage=group`` needs no critic: environments that set out from one state are a group, and
      the discounted return until the first end counts against those of the others
      (GRPO, arXiv 2402.03300; GBPO, arXiv 2604.18578).

    A diverged step has no say: with ``r = V`` and no bootstrap its own error is zero, and the step
    before it ends with the value of the last good observation.

    Deviation from RiskPO: time limits are the only ends of most control tasks, so episodes that
    reach them count; those do not that were begun in mid-course.

    Attributes:
        num_values: Values K that the critic must give.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.

    Raises:
        ConfigError: If settings and environment do not fit.
    """

    def __init__(self, settings: OnPolicySettings, specs: Specs) -> None:
        self.settings = settings
        self._specs = specs
        weights = settings.reward_weights or [1.0] * specs.num_rewards
        if len(weights) != specs.num_rewards:
            raise ConfigError(
                f"agent.reward_weights = {list(weights)}: the environment's reward has "
                f"{specs.num_rewards} terms; give one weight for each"
            )
        if settings.advantage == "group":
            specs.require_groups(settings.rollout_steps)
        self._weights = torch.tensor(weights)
        self.num_values = settings.num_values(specs)
        self._tracks = settings.risk.coefficient > 0.0 or settings.pipo.enabled
        self._episodes = EpisodeTracker(specs.num_envs, specs.num_rewards, weights=weights)
        self._std: Tensor | None = None
        risk = settings.risk
        self._quantiles = QuantileTracker(
            (risk.low_level, risk.high_level), risk.rate, iqr_window=_RISK_WINDOW
        )

    @torch.no_grad()
    def __call__(self, batch: TensorDict, value: Tensor, next_value: Tensor) -> Worth:
        """Return the worth of a rollout ``[num_envs, time]`` with values ``[..., K]`` each."""
        settings, after = self.settings, batch["next"]
        reward = after["reward"] * settings.reward_scale
        diverged = after["diverged"]
        if self.num_values == 1:
            reward = (reward * self._weights.to(reward)).sum(-1, keepdim=True)
        finished = self._episodes.update(batch) if self._tracks else None
        risk = None if finished is None else self._risk(finished)
        returns = torch.empty(0) if finished is None else finished.returns
        if settings.advantage == "group":
            groups, valid = self._of_groups(reward.squeeze(-1), after["done"], diverged)
            return Worth(**groups, target=value, valid=valid, risk=risk, returns=returns)
        valid = ~diverged.squeeze(-1)
        advantages, target = self._along_time(reward, value, next_value, after)
        return Worth(
            advantage=self._combined(advantages, valid),
            target=target,
            valid=valid,
            centred=None,
            risk=risk,
            feedback=None,
            returns=returns,
        )

    def _along_time(
        self, reward: Tensor, value: Tensor, next_value: Tensor, after: TensorDict
    ) -> tuple[Tensor, Tensor]:
        """Return advantages and targets ``[num_envs, time, K]``."""
        settings = self.settings
        estimate = gae if settings.advantage == "gae" else brax_gae
        diverged = after["diverged"]
        advantage, target = estimate(
            torch.where(diverged, value, reward).movedim(-1, 0),
            value.movedim(-1, 0),
            next_value.movedim(-1, 0),
            (after["terminated"] | diverged).movedim(-1, 0),
            after["done"].movedim(-1, 0),
            settings.gamma,
            settings.gae_lambda,
        )
        return advantage.movedim(0, -1), target.movedim(0, -1)

    def _combined(self, advantages: Tensor, valid: Tensor) -> Tensor:
        """Return one advantage ``[num_envs, time]`` of those of K terms ``[..., K]``."""
        if self.num_values == 1:
            return advantages.squeeze(-1)
        streams, mask = advantages.flatten(0, -2).T, valid.flatten()
        if self.settings.combine == "gdpo":
            combined = gdpo(streams, self._weights, mask=mask)
        else:
            std = group_std(streams, mask)
            self._std = std if self._std is None else torch.lerp(std, self._std, _STD_DECAY)
            combined = dvao(streams, self._weights, std=self._std, mask=mask)
        return combined.view(advantages.shape[:-1])

    def _of_groups(
        self, reward: Tensor, done: Tensor, diverged: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return fields of :class:`Worth` that count within groups, and the steps to learn from.

        All are ``[num_envs, time]``; members of a group have one advantage for all their steps.
        """
        steps = reward.shape[1]
        ended = done.squeeze(-1).long()
        counts = (ended.cumsum(1) - ended) == 0  # up to and with the first end
        sound = ~(diverged.squeeze(-1) & counts).any(1)
        discount = self.settings.gamma ** torch.arange(steps, device=reward.device)
        returns = (reward * counts * discount).sum(1)
        groups, mask = (x.view(-1, self._specs.group_size) for x in (returns, sound))
        advantage = group_relative(groups, mask=mask)
        one = torch.ones((), device=reward.device)
        fields = {
            "advantage": advantage,
            "centred": group_relative(groups, centre="median", mask=mask),
            "feedback": pipo_coefficients(advantage, one, grouped=True, maximum=math.inf),
        }
        along = {name: x.view(-1, 1).expand(-1, steps) for name, x in fields.items()}
        return along, counts & sound[:, None]

    def _risk(self, finished: FinishedEpisodes) -> Tensor | None:
        """Return the risk measure of each step's episode, centred, in standard deviations."""
        risk = self.settings.risk
        if risk.coefficient == 0.0:
            return None
        returns, of_step = finished.returns, finished.of_step.float()
        self._quantiles.update(returns)
        known = ~of_step.isnan()
        if not known.any():
            return torch.zeros_like(of_step)
        low, high = self._quantiles.quantile.to(of_step)
        measure = mixed_value_at_risk(
            of_step[known],
            low,
            high,
            low_level=risk.low_level,
            high_level=risk.high_level,
            mixing=risk.mixing,
        )
        spread = returns.std(correction=0).to(of_step)
        measure = (measure - measure.mean()) / torch.where(spread > 0, spread, 1.0)
        return torch.zeros_like(of_step).masked_scatter(known, risk.coefficient * measure)

    def state(self) -> dict[str, Any]:
        """Return what is remembered from rollout to rollout."""
        return {
            "episodes": self._episodes.state() if self._tracks else None,
            "std": self._std,
            "quantiles": dict(self._quantiles.state_dict()) if self._tracks else None,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._std = state["std"]
        if self._tracks:
            self._episodes.load_state(state["episodes"])
            self._quantiles.load_state_dict(state["quantiles"])
