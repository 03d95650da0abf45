"""The on-policy update: advantages, passes of a surrogate over minibatches, and the critics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from genpol import parallel
from genpol.agent import Specs
from genpol.nn.optimizer import GuardedOptimizer, step_together
from genpol.objectives.advantages import normalize_advantage
from genpol.objectives.bpo import soft_median_loss
from genpol.objectives.regularisers import value_loss
from genpol.objectives.selection import pipo_coefficients
from genpol.objectives.surrogates import clamped_log_ratio, ppo_clip
from genpol.on_policy.actors import ActorCritic
from genpol.on_policy.credit import Credit
from genpol.on_policy.likelihood import Evaluation, Likelihood, Rows
from genpol.on_policy.pipo import PIPO
from genpol.on_policy.settings import OnPolicySettings
from genpol.on_policy.surrogates import SURROGATES, Terms


class OnPolicyLearner:
    """Policy gradient by a surrogate loss, plus regression of the critic.

    Rollout and optimisation see the *same* observation statistics, which are updated afterwards;
    otherwise the first likelihood ratios would already differ from one.

    Several ranks (:mod:`genpol.parallel`) learn each from its share of the rollout: their gradients
    are averaged by rows, and what concerns all rows is computed of those of all ranks.

    Args:
        actor_critic: Actor and critics; what is trained.
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        generator: Source of the minibatch order and of random choices.
        likelihood: Of the actor.
    """

    def __init__(
        self,
        actor_critic: ActorCritic,
        settings: OnPolicySettings,
        *,
        specs: Specs,
        generator: torch.Generator,
        likelihood: Likelihood,
    ) -> None:
        self.actor_critic = actor_critic
        self.settings = settings
        self.gradient_steps = 0
        self._env_steps = 0
        self._share = 1.0
        self._action_repeat = specs.action_repeat
        self._generator = generator
        self._likelihood = likelihood
        self._credit = Credit(settings, specs)
        self._pipo = PIPO(settings.pipo) if settings.pipo.enabled else None
        self.surrogate = SURROGATES[settings.surrogate](
            settings, actor_critic.actor, specs.action_dim, generator
        )
        # These have a scale of their own, which whitening would undo.
        combined = settings.combine == "dvao" and self._credit.num_values > 1
        own_scale = combined or settings.advantage == "group"
        self._normalizes = self.surrogate.normalizes_advantage and not own_scale
        actor = [*actor_critic.actor.parameters()]
        critics = [*actor_critic.critic.parameters()]
        if actor_critic.median_critic is not None:
            critics += actor_critic.median_critic.parameters()
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
        batch_steps = batch.numel() * self._action_repeat * parallel.size()
        self._env_steps += batch_steps
        self.surrogate.begin_rollout(self._env_steps, batch_steps)
        rollout, returns, metrics = self._prepare(batch)
        if self._pipo is not None:
            metrics |= self._correct_previous(self._pipo, rollout, returns)
        metrics |= self._optimise(rollout)
        self._likelihood.end_rollout()
        self.actor_critic.update_statistics(batch)
        metrics["policy/learning_rate"] = torch.tensor(self._actor_optimizer.learning_rate)
        metrics["skipped_updates"] = torch.tensor(float(self.skipped))
        return metrics

    @torch.no_grad()
    def _prepare(self, batch: TensorDict) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """Return the rollout as rows, returns of its episodes, and what it says of the critic."""
        after = batch["next"]
        observation = self.actor_critic.normalizer(batch["observation"])
        key = self.actor_critic.critic_key
        judged = observation if key == "observation" else self.actor_critic.critic_view(batch[key])
        value, _ = self.actor_critic.values_at_normalized(judged)
        # The next step's value is at hand except where an episode or the rollout ends.
        next_value = torch.cat([value[:, 1:], value[:, -1:]], dim=1)
        ends = after["done"].squeeze(-1).clone()
        ends[:, -1] = True
        next_value[ends] = self.actor_critic.value(after[key][ends])
        worth = self._credit(batch, value, next_value)
        kept = self._likelihood.keep(batch, observation)
        kept |= {
            "observation": observation,
            key: judged,
            "advantage": worth.advantage,
            "target": worth.target,
        }
        optional = {"centred": worth.centred, "risk": worth.risk, "feedback": worth.feedback}
        kept |= {name: x for name, x in optional.items() if x is not None}
        rows = {name: x.flatten(0, 1)[worth.valid.flatten()] for name, x in kept.items()}
        if self.settings.advantage == "group":  # there the critic is not trained
            return rows, worth.returns, {}
        residual = (worth.target - value)[worth.valid]
        metrics = {
            "value/explained_variance": 1 - residual.var() / rows["target"].var(),
            "value/mean": value.sum(-1).mean() / self.settings.reward_scale,
        }
        return rows, worth.returns, metrics

    def _correct_previous(self, pipo: PIPO, rollout: Rows, returns: Tensor) -> dict[str, Tensor]:
        """Repeat or undo the update before this one, as the returns since tell."""
        multiplier = pipo.judge(returns)
        previous, pipo.previous = pipo.previous, dict(rollout)
        if previous and len(previous["advantage"]) > 0 and multiplier != 0:
            feedback = previous.get("feedback")
            if feedback is None:
                feedback = normalize_advantage(previous["advantage"])
            previous["advantage"] = pipo_coefficients(feedback, multiplier, grouped=False)
            for rows in self._minibatches(previous):
                log_prob, advantage = self._likelihood.evaluate(rows).log_prob, rows["advantage"]
                log_ratio = clamped_log_ratio(log_prob, rows["log_prob"])
                if log_ratio.ndim > 1:
                    advantage = advantage.unsqueeze(-1).expand_as(log_ratio)
                clip = self.settings.clip
                loss = ppo_clip(log_ratio, advantage, clip_low=clip, clip_high=clip).mean()
                self._actor_optimizer.step(loss)
                self.gradient_steps += 1
        return {"pipo/multiplier": multiplier}

    def _optimise(self, rollout: Rows) -> dict[str, Tensor]:
        """Make the passes over a rollout and return metrics averaged over their steps."""
        number = len(rollout["target"])
        if parallel.least(number) == 0:
            return {}
        self._share = _share(number)
        # Without any reward all advantages are zero, and Adam, which knows no scale, would let the
        # prior alone move the actor at full speed.
        learn_actor = parallel.any_of(bool(rollout["advantage"].abs().max() > 1e-8))
        history: list[dict[str, Tensor]] = []
        last_pass: list[dict[str, Tensor]] = []
        for _ in range(self.settings.epochs):
            last_pass = [self._step(rows, learn_actor) for rows in self._minibatches(rollout)]
            history += last_pass
            if learn_actor:
                self.surrogate.end_pass()
        if learn_actor:
            divergence = torch.stack([step["policy/approx_kl"] for step in last_pass]).mean()
            self._adapt_learning_rate(parallel.mean(divergence))
        metrics = {
            name: torch.stack([step[name] for step in history]).mean() for name in history[-1]
        }
        largest = torch.stack([x["policy/ratio_max"] for x in history]).max()
        metrics["policy/ratio_max"] = parallel.greatest(largest)
        return metrics

    def _minibatches(self, rollout: Rows) -> Iterator[Rows]:
        """Yield the rows of a rollout in random order."""
        number = len(rollout["target"])
        generator = parallel.branch(self._generator)
        order = torch.randperm(number, generator=generator, device=generator.device)
        parts = min(self.settings.minibatches, parallel.least(number))
        pieces = {name: x[order].tensor_split(parts) for name, x in rollout.items()}
        for index in range(parts):
            yield {name: piece[index] for name, piece in pieces.items()}

    def _step(self, rows: Rows, learn_actor: bool = True) -> dict[str, Tensor]:
        """Take one step of the actor, those of the critics on its rows, and return metrics."""
        values = self.actor_critic.values_at_normalized(rows[self.actor_critic.critic_key])
        loss, metrics = self._actor_loss(rows, *values)
        losses = [(self._actor_optimizer, self._weighed(loss))] if learn_actor else []
        learn_critic = self.settings.advantage != "group"
        pieces = max(1, self.settings.critic_minibatches // self.settings.minibatches)
        if learn_critic and pieces == 1:
            loss, more = self._critic_loss(*values, rows["target"])
            losses.append((self._critic_optimizer, self._weighed(loss)))
            metrics |= more
        if losses:
            step_together(*losses)  # actor and critics have no parameter in common
        if learn_actor:
            self.surrogate.end_step()
        if learn_critic and pieces > 1:
            metrics |= self._critic_steps(rows, pieces)
        self.gradient_steps += 1
        return metrics

    def _critic_steps(self, rows: Rows, number: int) -> dict[str, Tensor]:
        """Take steps of the critics on so many pieces of the rows; return the last metrics."""
        metrics: dict[str, Tensor] = {}
        number = min(number, parallel.least(len(rows["target"])))
        observations = rows[self.actor_critic.critic_key].tensor_split(number)
        targets = rows["target"].tensor_split(number)
        for observation, target in zip(observations, targets, strict=True):
            values = self.actor_critic.values_at_normalized(observation)
            loss, metrics = self._critic_loss(*values, target)
            self._critic_optimizer.step(self._weighed(loss))
        return metrics

    def _weighed(self, loss: Tensor) -> Tensor:
        """Weigh the mean over this rank's rows; the mean over ranks is then that over all rows."""
        return loss if self._share == 1.0 else loss * self._share

    def _critic_loss(
        self, value: Tensor, median: Tensor | None, target: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = value_loss(value, target)
        temperature = self.settings.median_temperature
        if median is not None and temperature is not None:
            median_loss = soft_median_loss(
                median, target.squeeze(-1), temperature=temperature
            ).mean()
            metrics["loss/median"] = median_loss.detach()
            loss = loss + median_loss
        return loss, metrics

    def _actor_loss(
        self, rows: Rows, value: Tensor, median: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        evaluation = self._likelihood.evaluate(rows)
        log_ratio = clamped_log_ratio(evaluation.log_prob, rows["log_prob"])
        terms = self._terms(rows, evaluation, log_ratio, value, median)
        losses, metrics = self.surrogate.loss(terms)
        keep = self._likelihood.mask(rows, terms.advantage, self._actor_optimizer)
        if keep is not None:
            losses = torch.where(keep, losses, 0.0)
            metrics["policy/masked"] = 1.0 - keep.float().mean()
        loss = losses.mean() + evaluation.regulariser
        ratio = log_ratio.detach().exp()
        outside = (ratio - 1.0).abs() > self.settings.clip
        return loss, metrics | {
            **evaluation.metrics,
            "loss/policy": loss.detach(),
            "policy/approx_kl": (torch.expm1(log_ratio.detach()) - log_ratio.detach()).mean(),
            "policy/clip_fraction": outside.to(ratio.dtype).mean(),
            "policy/ratio_max": ratio.max(),
        }

    def _terms(
        self,
        rows: Rows,
        evaluation: Evaluation,
        log_ratio: Tensor,
        value: Tensor,
        median: Tensor | None,
    ) -> Terms:
        """Return what the surrogate reads, with one row for every ratio."""
        advantage = rows["advantage"]
        if self._normalizes:
            advantage = normalize_advantage(advantage)
        if "risk" in rows:
            advantage = advantage + rows["risk"]
        steps = log_ratio.shape[1:]

        def each(x: Tensor) -> Tensor:
            return x.unsqueeze(-1).expand(-1, *steps).flatten() if steps else x

        advantage, clip = each(advantage), evaluation.step_clip
        if evaluation.step_weight is not None:
            advantage = advantage * evaluation.step_weight.repeat(len(log_ratio))
        return Terms(
            log_prob=evaluation.log_prob.flatten(),
            log_ratio=log_ratio.flatten(),
            advantage=advantage,
            target=each(rows["target"].sum(-1)),
            value=each(value.detach().sum(-1)),
            median=None if median is None else each(median.detach()),
            centred=each(rows["centred"]) if "centred" in rows else None,
            clip=None if clip is None else clip.repeat(len(log_ratio)),
            divergence=lambda: evaluation.divergence().flatten(),
            proximal_log_prob=torch.no_grad()(
                lambda actor: self._likelihood.log_prob(actor, rows).flatten()
            ),
        )

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
            "likelihood": self._likelihood.state(),
            "credit": self._credit.state(),
            "pipo": None if self._pipo is None else self._pipo.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._actor_optimizer.load_state_dict(state["actor_optimizer"])
        self._critic_optimizer.load_state_dict(state["critic_optimizer"])
        self.gradient_steps = state["gradient_steps"]
        self._env_steps = state["env_steps"]
        self.surrogate.load_state(state["surrogate"])
        self._likelihood.load_state(state["likelihood"])
        self._credit.load_state(state["credit"])
        if self._pipo is not None:
            self._pipo.load_state(state["pipo"])


def _share(number: int) -> float:
    """Return this rank's rows over the mean of all ranks; diverged steps make some short."""
    return number / float(parallel.mean(torch.tensor(float(number))))
