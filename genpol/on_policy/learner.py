"""The on-policy update: advantages, passes of a surrogate over minibatches, and the critics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from genpol.nn.optimizer import GuardedOptimizer
from genpol.objectives.advantages import brax_gae, gae, normalize_advantage
from genpol.objectives.bpo import soft_median_loss
from genpol.objectives.regularisers import value_loss
from genpol.objectives.surrogates import clamped_log_ratio
from genpol.on_policy.actors import Encoder
from genpol.on_policy.likelihood import LatentLikelihood, Likelihood, Rows
from genpol.on_policy.settings import OnPolicySettings
from genpol.on_policy.surrogates import SURROGATES, Terms


class OnPolicyLearner:
    """Policy gradient by a surrogate loss, plus regression of the critic.

    Rollout and optimisation see the *same* observation statistics, which are updated afterwards;
    otherwise the first likelihood ratios would already differ from one.

    Args:
        encoder: Actor and critics; what is trained.
        settings: Hyper-parameters.
        generator: Source of the minibatch order and of random choices.
        action_repeat: Environment steps per row, for schedules.
        likelihood: Of the actor; by default that of Gaussian latents.
    """

    def __init__(
        self,
        encoder: Encoder,
        settings: OnPolicySettings,
        *,
        generator: torch.Generator,
        action_repeat: int = 1,
        likelihood: Likelihood | None = None,
    ) -> None:
        self.encoder = encoder
        self.settings = settings
        self.gradient_steps = 0
        self._env_steps = 0
        self._action_repeat = action_repeat
        self._generator = generator
        self._likelihood = likelihood or LatentLikelihood(encoder.actor, settings, generator)
        action_dim = encoder.actor.action_shape[-1]
        self.surrogate = SURROGATES[settings.surrogate](
            settings, encoder.actor, action_dim, generator
        )
        actor, critics = [*encoder.actor.parameters()], [*encoder.critic.parameters()]
        if encoder.median_critic is not None:
            critics += encoder.median_critic.parameters()
        self._actor_optimizer = self._optimizer("actor", actor, settings.learning_rate)
        self._critic_optimizer = self._optimizer("critic", critics, settings.critic_learning_rate)

    @property
    def skipped(self) -> int:
        """Optimiser steps left out because loss or gradient were not finite."""
        return self._actor_optimizer.skipped + self._critic_optimizer.skipped

    def _optimizer(
        self, name: str, parameters: list[nn.Parameter], learning_rate: float
    ) -> GuardedOptimizer:
        return GuardedOptimizer(
            parameters,
            learning_rate,
            max_grad_norm=self.settings.max_grad_norm,
            eps=1e-5,
            patience=self.settings.nonfinite_patience,
            name=name,
        )

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Learn from a rollout ``[num_envs, time]`` and return metrics."""
        batch_steps = batch.numel() * self._action_repeat
        self._env_steps += batch_steps
        self.surrogate.begin_rollout(self._env_steps, batch_steps)
        rollout, metrics = self._prepare(batch)
        metrics |= self._optimise(rollout)
        self.encoder.normalizer.update(batch["observation"])
        metrics["policy/learning_rate"] = torch.tensor(self._actor_optimizer.learning_rate)
        metrics["skipped_updates"] = torch.tensor(float(self.skipped))
        return metrics

    @torch.no_grad()
    def _prepare(self, batch: TensorDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the rollout as rows, and what it says about critic and actions."""
        settings, after = self.settings, batch["next"]
        observation = self.encoder.normalizer(batch["observation"])
        value, _ = self.encoder.values_at_normalized(observation)
        done = after["done"].squeeze(-1)
        # The next step's value is at hand except where an episode or the rollout ends.
        next_value = torch.cat([value[:, 1:], value[:, -1:]], dim=1)
        ends = done.clone()
        ends[:, -1] = True
        next_value[ends] = self.encoder.value(after["observation"][ends])
        # A diverged step has no say: with r = V and no bootstrap its own error is zero, and the
        # step before it ends with the value of the last good observation.
        diverged = after["diverged"].squeeze(-1)
        reward = after["reward"].squeeze(-1) * settings.reward_scale
        estimate = gae if settings.advantage == "gae" else brax_gae
        advantage, target = estimate(
            torch.where(diverged, value, reward),
            value,
            next_value,
            after["terminated"].squeeze(-1) | diverged,
            done,
            settings.gamma,
            settings.gae_lambda,
        )
        kept = self._likelihood.keep(batch, observation)
        kept |= {"observation": observation, "advantage": advantage, "target": target}
        keep = ~diverged.flatten()
        rows = {name: x.flatten(0, 1)[keep] for name, x in kept.items()}
        residual = (target - value).flatten()[keep]
        metrics = {
            "value/explained_variance": 1 - residual.var() / rows["target"].var(),
            "value/mean": value.mean() / settings.reward_scale,
        }
        return rows, metrics

    def _optimise(self, rollout: Rows) -> dict[str, Tensor]:
        """Make the passes over a rollout and return metrics averaged over their steps."""
        number = len(rollout["target"])
        if number == 0:
            return {}
        # Without any reward all advantages are zero, and Adam, which knows no scale, would let the
        # prior alone move the actor at full speed.
        learn_actor = bool(rollout["advantage"].abs().max() > 1e-8)
        history: list[dict[str, Tensor]] = []
        last_pass: list[dict[str, Tensor]] = []
        for _ in range(self.settings.epochs):
            last_pass = [self._step(rows, learn_actor) for rows in self._minibatches(rollout)]
            history += last_pass
            if learn_actor:
                self.surrogate.end_pass()
        if learn_actor:
            divergence = torch.stack([step["policy/approx_kl"] for step in last_pass]).mean()
            self._adapt_learning_rate(divergence)
        metrics = {
            name: torch.stack([step[name] for step in history]).mean() for name in history[-1]
        }
        metrics["policy/ratio_max"] = torch.stack([x["policy/ratio_max"] for x in history]).max()
        return metrics

    def _minibatches(self, rollout: Rows) -> Iterator[Rows]:
        """Yield the rows of a rollout in random order."""
        number = len(rollout["target"])
        order = torch.randperm(number, generator=self._generator, device=self._generator.device)
        for part in order.tensor_split(min(self.settings.minibatches, number)):
            yield {name: x[part] for name, x in rollout.items()}

    def _step(self, rows: Rows, learn_actor: bool = True) -> dict[str, Tensor]:
        """Take one step of the actor, those of the critics on its rows, and return metrics."""
        values = self.encoder.values_at_normalized(rows["observation"])
        metrics = self._actor_step(rows, *values, learn_actor)
        pieces = max(1, self.settings.critic_minibatches // self.settings.minibatches)
        if pieces == 1:
            metrics |= self._critic_step(*values, rows["target"])
        else:
            observations = rows["observation"].tensor_split(pieces)
            targets = rows["target"].tensor_split(pieces)
            for observation, target in zip(observations, targets, strict=True):
                values = self.encoder.values_at_normalized(observation)
                metrics |= self._critic_step(*values, target)
        self.gradient_steps += 1
        return metrics

    def _critic_step(
        self, value: Tensor, median: Tensor | None, target: Tensor
    ) -> dict[str, Tensor]:
        loss, metrics = value_loss(value, target)
        temperature = self.settings.median_temperature
        if median is not None and temperature is not None:
            median_loss = soft_median_loss(median, target, temperature=temperature).mean()
            metrics["loss/median"] = median_loss.detach()
            loss = loss + median_loss
        self._critic_optimizer.step(loss)
        return metrics

    def _actor_step(
        self, rows: Rows, value: Tensor, median: Tensor | None, learn: bool
    ) -> dict[str, Tensor]:
        evaluation = self._likelihood.evaluate(rows)
        log_ratio = clamped_log_ratio(evaluation.log_prob, rows["log_prob"])
        advantage = rows["advantage"]
        if self.surrogate.normalizes_advantage:
            advantage = normalize_advantage(advantage)
        losses, metrics = self.surrogate.loss(
            Terms(
                log_prob=evaluation.log_prob,
                log_ratio=log_ratio,
                advantage=advantage,
                target=rows["target"],
                value=value.detach(),
                median=None if median is None else median.detach(),
                divergence=evaluation.divergence,
                proximal_log_prob=torch.no_grad()(
                    lambda actor: self._likelihood.log_prob(actor, rows)
                ),
            )
        )
        loss = losses.mean() + evaluation.regulariser
        if learn:
            self._actor_optimizer.step(loss)
            self.surrogate.end_step()
        ratio = log_ratio.detach().exp()
        outside = (ratio - 1.0).abs() > self.settings.clip
        return metrics | {
            **evaluation.metrics,
            "loss/policy": loss.detach(),
            "policy/approx_kl": (torch.expm1(log_ratio.detach()) - log_ratio.detach()).mean(),
            "policy/clip_fraction": outside.to(ratio.dtype).mean(),
            "policy/ratio_max": ratio.max(),
        }

    def _adapt_learning_rate(self, divergence: Tensor) -> None:
        """Steer the actor's step size towards the target divergence (as rsl_rl does).

        It moves by factors of 1.5 between 1e-5 and 1e-2, or up to a start outside that range.
        """
        target, optimizer = self.settings.target_kl, self._actor_optimizer
        if target == 0:
            return
        rate = optimizer.learning_rate
        if divergence > 2 * target:
            optimizer.learning_rate = min(rate, max(rate / 1.5, 1e-5))
        elif divergence < target / 2:
            optimizer.learning_rate = max(rate, min(rate * 1.5, 1e-2))

    def continue_from(self, previous: OnPolicyLearner) -> None:
        """Go on counting where a learner left off whose actor this one's replaces."""
        self.gradient_steps = previous.gradient_steps
        self._env_steps = previous._env_steps

    def state(self) -> dict[str, Any]:
        """Return optimisers, counters and what the surrogate remembers."""
        return {
            "actor_optimizer": self._actor_optimizer.state_dict(),
            "critic_optimizer": self._critic_optimizer.state_dict(),
            "gradient_steps": self.gradient_steps,
            "env_steps": self._env_steps,
            "surrogate": self.surrogate.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._actor_optimizer.load_state_dict(state["actor_optimizer"])
        self._critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.gradient_steps = state["gradient_steps"]
        self._env_steps = state.get("env_steps", 0)
        self.surrogate.load_state(state.get("surrogate", {}))
