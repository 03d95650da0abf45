"""Search over plans in a world model, for several environments in one call.

All randomness is an argument: the searches are functions of tensors and can be compiled. Rows of a
call are E environments (or states of a replay), each with N candidate plans of H actions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from genpol.nn.compiling import compiled
from genpol.objectives.plan_search import (
    SearchSchedule,
    expected_plan,
    known,
    mppi_weights,
    plan_score,
    refit,
    reverse_step,
    search_weights,
    weighted_std,
)
from genpol.world_model.energy import EnergyScale
from genpol.world_model.networks import Task, WorldModel

Draws = Mapping[str, Tensor]
"""Random numbers by name."""

Returns = Callable[[Tensor, int], Tensor]
"""Of candidates ``[E, N, H, A]`` in a round of that number: ``[E, N]``."""

Hide = Callable[[Tensor], Tensor]
"""Zero what a task does not use of plans ``[E, ..., A]``."""


class Planned(NamedTuple):
    """What a search found.

    Attributes:
        plan: To start the next search from, within [-1, 1], ``[E, H, A]``.
        action: To carry out, ``[E, A]``.
        explored: To carry out where exploring, ``[E, A]``.
        value: Mean return of the last round's candidates under their weights, ``[E]``; ``None``
            where nothing was imagined.
        spread: Their mean standard deviation, ``[E]``.
    """

    plan: Tensor
    action: Tensor
    explored: Tensor
    value: Tensor | None = None
    spread: Tensor | None = None


class Found(NamedTuple):
    """The last round of a search.

    Attributes:
        plan: ``[E, H, A]``.
        candidates: ``[E, N, H, A]``.
        weights: ``[E, N]``.
        returns: ``[E, N]``.
        std: Standard deviation of the candidates under their weights, ``[E, H, A]``.
    """

    plan: Tensor
    candidates: Tensor
    weights: Tensor
    returns: Tensor
    std: Tensor

    @property
    def value(self) -> Tensor:
        """Weighted mean return, ``[E]``."""
        return (self.weights * self.returns).sum(-1)

    @property
    def spread(self) -> Tensor:
        """Mean of the standard deviations, ``[E]``."""
        return self.std.mean((-2, -1))


def reverse_diffusion(
    start: Tensor,
    returns: Returns,
    schedule: SearchSchedule,
    noise: Tensor,
    *,
    temperature: float,
    elites: int = 0,
    proposals: Tensor | None = None,
    hide: Hide = lambda plans: plans,
) -> Found:
    """Denoise plans whose score is estimated from weighted candidates (MBDPO, official code).

    The search begins at ``x_{T-1} = sqrt(abar_{T-1}) start``, without noise, as the official code
    does, and takes the T - 1 steps of :func:`~genpol.objectives.plan_search.reverse_step`.

    Args:
        start: Plan that the widest candidates are centred on, ``[E, H, A]``.
        returns: Values the candidates.
        schedule: Noise levels.
        noise: Of all candidates but the proposals, standard normal, ``[T - 1, E, N - P, H, A]``.
        temperature: See :func:`~genpol.objectives.plan_search.search_weights`.
        elites: See there.
        proposals: The first candidates of each round, ``[T - 1, E, P, H, A]``.
        hide: Of the tasks' unused dimensions.
    """
    levels = schedule.levels()
    x = hide(start) * schedule.alpha_bar[levels[0]] ** 0.5
    for index, level in enumerate(levels):
        alpha_bar = schedule.alpha_bar[level]
        centre = (x / alpha_bar**0.5).unsqueeze(1)
        fresh = (centre + schedule.sigma(level) * noise[index]).clamp(-1.0, 1.0)
        candidates = fresh if proposals is None else torch.cat((proposals[index], fresh), dim=1)
        candidates = hide(candidates)
        gained = known(returns(candidates, index))
        weights = search_weights(gained, temperature=temperature, elites=elites)
        expected = expected_plan(weights, candidates)
        score = plan_score(x, expected, alpha_bar)
        x = hide(reverse_step(x, score, schedule.alpha[level], alpha_bar))
    std = weighted_std(weights, candidates, expected)
    return Found(x.clamp(-1.0, 1.0), candidates, weights, gained, std)


def mppi(
    start: Tensor,
    returns: Returns,
    noise: Tensor,
    *,
    temperature: float,
    elites: int,
    least: float,
    greatest: float,
    proposals: Tensor | None = None,
    hide: Hide = lambda plans: plans,
) -> Found:
    """Refit a Gaussian over plans to its best candidates, round by round (TD-MPC2, official code).

    Args:
        start: Mean of the first round, ``[E, H, A]``; its standard deviation is the greatest.
        returns: Values the candidates.
        noise: Of all candidates but the proposals, standard normal, ``[rounds, E, N - P, H, A]``.
        temperature: See :func:`~genpol.objectives.plan_search.mppi_weights`.
        elites: See there.
        least: Lower bound of the standard deviation.
        greatest: Upper bound.
        proposals: The first candidates of every round, ``[E, P, H, A]``.
        hide: Of the tasks' unused dimensions.
    """
    mean, std = hide(start), torch.full_like(start, greatest)
    for index, draws in enumerate(noise.unbind(0)):
        fresh = (mean.unsqueeze(1) + std.unsqueeze(1) * draws).clamp(-1.0, 1.0)
        candidates = fresh if proposals is None else torch.cat((proposals, fresh), dim=1)
        candidates = hide(candidates)
        gained = known(returns(candidates, index))
        weights = mppi_weights(gained, temperature=temperature, elites=elites)
        mean, std = refit(weights, candidates, least=least, greatest=greatest)
    return Found(mean, candidates, weights, gained, std)


def imagined_return(
    model: WorldModel,
    latent: Tensor,
    plans: Tensor,
    tail_noise: Tensor,
    members: Tensor | None,
    task: Task,
    energy: EnergyScale | None = None,
) -> Tensor:
    """Return what the model expects of plans, ``[E, N]``.

    ``J(U) = sum_t gamma^t m_t (R(z_t, a_t) + eta F_norm(z_t, a_t)) + gamma^H m_H mean_j Q_j(z_H,
    a_H)`` with ``a_H`` from the policy prior and the live critics (official codes of MBDPO
    and, without F, TD-MPC2). ``m`` falls to 0 behind a predicted end.

    Args:
        model: The networks.
        latent: Where plans begin, ``[E, L]``.
        plans: ``[E, N, H, A]``.
        tail_noise: Standard normal, ``[E, N, A]``.
        members: Critics to average over, int64 ``[M]``; ``None`` for all.
        task: Of each environment.
        energy: Scale and weight of the classifier's logits, where there is one.
    """
    envs, number, horizon, dims = plans.shape
    rows = envs * number
    task = task.repeat(number)
    actions = plans.reshape(rows, horizon, dims).transpose(0, 1)
    latents = model.imagine(latent.repeat_interleave(number, 0), actions, task)
    inputs = model.pair(latents[:-1], actions, task)
    earned = model.scalar.decode(model.reward(inputs))
    if energy is not None and model.energy is not None:
        earned = earned + energy.bonus(model.energy(inputs).squeeze(-1))
    last = model.act(latents[-1], tail_noise.reshape(rows, dims), task).action
    value = model.values(latents[-1], last, task, members=members).mean(0)
    discount = torch.stack([task.gamma**t for t in range(horizon + 1)])
    gained = torch.cat((earned, value.unsqueeze(0)))
    if model.termination is not None:
        ended = model.termination(model.state(latents[1:], task)).squeeze(-1) > 0.0
        over = ended.long().cumsum(0) > 0
        gained = torch.cat((gained[:1], torch.where(over, 0.0, gained[1:])))
    return (discount.view(horizon + 1, -1) * gained).sum(0).view(envs, number)


def policy_plans(model: WorldModel, latent: Tensor, noise: Tensor, task: Task) -> Tensor:
    """Roll the policy prior out in the model, ``[R, E, P, H, A]``.

    Args:
        model: The networks.
        latent: ``[E, L]``.
        noise: Standard normal, ``[R, E, P, H, A]``.
        task: Of each environment.
    """
    rounds, envs, number, horizon, dims = noise.shape
    task = task.repeat(number)
    z = latent.repeat_interleave(number, 0).expand(rounds, -1, -1)
    steps = []
    for t in range(horizon):
        steps.append(model.act(z, noise[..., t, :].reshape(rounds, -1, dims), task).action)
        if t < horizon - 1:
            z = model.dynamics(model.pair(z, steps[-1], task))
    return torch.stack(steps, dim=2).view(rounds, envs, number, horizon, dims)


def noisy(action: Tensor, noise: Tensor, task: Task) -> Tensor:
    """Return ``clip(a + noise, -1, 1)``, ``[E, A]``, zero in dimensions that are not in use."""
    return task.hide((action + noise).clamp(-1.0, 1.0))


class Planner(ABC):
    """Makes plans in a model.

    Args:
        model: The networks.
        horizon: Actions H of a plan.
    """

    def __init__(self, model: WorldModel, *, horizon: int) -> None:
        self.model = model
        self.horizon = horizon
        self._value = imagined_return

    def compile(self, name: str) -> None:
        """Compile what takes the most time: one round's imagination, not the whole search.

        Args:
            name: The setting that asks for it.
        """
        self._value = compiled(imagined_return, name=name)

    @abstractmethod
    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """Draw the random numbers of a search for so many environments."""

    @abstractmethod
    def plan(self, latent: Tensor, start: Tensor, draws: Draws, task: Task) -> Planned:
        """Search from latents ``[E, L]`` and plans to start from, ``[E, H, A]``."""

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)

    def _search_draws(
        self, rounds: int, rows: int, generator: torch.Generator, *, number: int, own: int
    ) -> dict[str, Tensor]:
        """Draw candidates, rollouts of the policy, tails, and the two critics of each round."""
        dims = self.model.action_dim
        drawn = {
            "candidates": self._normal((rounds, rows, number - own, self.horizon, dims), generator),
            "tails": self._normal((rounds, rows, number, dims), generator),
            "explore": self._normal((rows, dims), generator),
        }
        if (members := two_critics(self.model, rounds, generator)) is not None:
            drawn["critics"] = members
        return drawn

    def _returns(
        self, latent: Tensor, draws: Draws, task: Task, energy: EnergyScale | None = None
    ) -> Returns:
        critics = draws.get("critics")

        def returns(plans: Tensor, index: int) -> Tensor:
            members = None if critics is None else critics[index]
            tails = draws["tails"][index]
            return self._value(self.model, latent, plans, tails, members, task, energy)

        return returns


def two_critics(model: WorldModel, rounds: int, generator: torch.Generator) -> Tensor | None:
    """Draw two different critics for each round, int64 ``[rounds, 2]``; ``None`` if there are two.

    One critic alone is ``None`` as well: all of them.
    """
    number = model.critics.num_members
    if number <= 2:
        return None
    scores = torch.rand((rounds, number), generator=generator, device=generator.device)
    return scores.argsort(-1)[:, :2]


class PolicyPlanner(Planner):
    """No search: the policy prior acts (TD-MPC2 with ``mpc = false``)."""

    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """See :class:`Planner`."""
        return {"explore": self._normal((rows, self.model.action_dim), generator)}

    def plan(self, latent: Tensor, start: Tensor, draws: Draws, task: Task) -> Planned:
        """See :class:`Planner`."""
        mode = self.model.act(latent, None, task).action
        explored = self.model.act(latent, draws["explore"], task).action
        return Planned(torch.zeros_like(start), mode, explored)


class MPPIPlanner(Planner):
    """Model-predictive path integral control (TD-MPC2, arXiv 2310.16828, section 3.2).

    The action is the first of an elite that is drawn by its weight, also where nothing is explored
    (official code); exploration adds noise of the fitted standard deviation.

    Args:
        model: The networks.
        horizon: Actions H of a plan.
        rounds: Rounds of candidates.
        number: Candidates N of each, those of the policy among them.
        elites: Of which the best K count.
        policy_plans: Candidates that are rollouts of the policy, drawn once.
        temperature: Multiplies returns.
        least: Lower bound of the standard deviation.
        greatest: Upper bound, where it begins.
    """

    def __init__(
        self,
        model: WorldModel,
        *,
        horizon: int,
        rounds: int,
        number: int,
        elites: int,
        policy_plans: int,
        temperature: float,
        least: float,
        greatest: float,
    ) -> None:
        super().__init__(model, horizon=horizon)
        self.rounds = rounds
        self.number = number
        self.elites = elites
        self.policy_plans = policy_plans
        self.temperature = temperature
        self.least = least
        self.greatest = greatest

    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """See :class:`Planner`."""
        own = self.policy_plans
        drawn = self._search_draws(self.rounds, rows, generator, number=self.number, own=own)
        if own > 0:
            shape = (1, rows, own, self.horizon, self.model.action_dim)
            drawn["policy"] = self._normal(shape, generator)
        drawn["choice"] = torch.rand(rows, 1, generator=generator, device=generator.device)
        return drawn

    def plan(self, latent: Tensor, start: Tensor, draws: Draws, task: Task) -> Planned:
        """See :class:`Planner`."""
        own = draws.get("policy")
        found = mppi(
            start,
            self._returns(latent, draws, task),
            draws["candidates"],
            temperature=self.temperature,
            elites=self.elites,
            least=self.least,
            greatest=self.greatest,
            proposals=None if own is None else policy_plans(self.model, latent, own, task)[0],
            hide=task.hide_plans,
        )
        # The candidate at which the cumulated weight first passes a uniform draw.
        passed = found.weights.cumsum(-1) > draws["choice"] * found.weights.sum(-1, keepdim=True)
        chosen = passed.long().argmax(-1)
        rows = torch.arange(len(latent), device=latent.device)
        action = found.candidates[rows, chosen, 0]
        explored = noisy(action, found.std[:, 0] * draws["explore"], task)
        return Planned(found.plan, action, explored, found.value, found.spread)


class DiffusionPlanner(Planner):
    """Reverse diffusion over plans (MBDPO, arXiv 2605.26282).

    Args:
        model: The networks.
        horizon: Actions H of a plan.
        schedule: Noise levels.
        number: Candidates N of each step, those of the policy among them.
        elites: Of which the best K count; 0 for all.
        policy_plans: Candidates that are rollouts of the policy, drawn anew at each step.
        temperature: Softmax temperature of standardised returns.
        action_noise: Standard deviation of exploration.
        energy: Scale and weight of the energy in the imagined reward.
    """

    def __init__(
        self,
        model: WorldModel,
        *,
        horizon: int,
        schedule: SearchSchedule,
        number: int,
        elites: int,
        policy_plans: int,
        temperature: float,
        action_noise: float,
        energy: EnergyScale | None,
    ) -> None:
        super().__init__(model, horizon=horizon)
        self.schedule = schedule
        self.number = number
        self.elites = elites
        self.policy_plans = policy_plans
        self.temperature = temperature
        self.action_noise = action_noise
        self.energy = energy

    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """See :class:`Planner`."""
        rounds, own = self.schedule.steps - 1, self.policy_plans
        drawn = self._search_draws(rounds, rows, generator, number=self.number, own=own)
        if own > 0:
            shape = (rounds, rows, own, self.horizon, self.model.action_dim)
            drawn["policy"] = self._normal(shape, generator)
        return drawn

    def plan(self, latent: Tensor, start: Tensor, draws: Draws, task: Task) -> Planned:
        """See :class:`Planner`."""
        own = draws.get("policy")
        found = reverse_diffusion(
            start,
            self._returns(latent, draws, task, self.energy),
            self.schedule,
            draws["candidates"],
            temperature=self.temperature,
            elites=self.elites,
            proposals=None if own is None else policy_plans(self.model, latent, own, task),
            hide=task.hide_plans,
        )
        action = found.plan[:, 0]
        explored = noisy(action, self.action_noise * draws["explore"], task)
        return Planned(found.plan, action, explored, found.value, found.spread)
