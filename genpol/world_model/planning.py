"""Search over plans in a world model, for several environments in one call.

All randomness is an argument: the searches are functions of tensors and can be compiled. Rows of a
call are E environments (or states of a replay), each with N candidate plans of H actions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from genpol.nn.compiling import compiled
from genpol.objectives.plan_search import SearchSchedule, mppi_weights, search_weights
from genpol.world_model.energy import EnergyScale
from genpol.world_model.networks import Task, WorldModel
from genpol.world_model.search import (
    Round,
    Sampler,
    mppi,
    reverse_diffusion,
    weigh_candidates,
)

Draws = Mapping[str, Tensor]
"""Random numbers by name."""


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

    @abstractmethod
    def compile(self, name: str, *, graphs: bool = False) -> None:
        """Compile what takes the time.

        Args:
            name: The setting that asks for it.
            graphs: Whether to record CUDA graphs.
        """

    @abstractmethod
    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """Draw the random numbers of a search for so many environments."""

    @abstractmethod
    def plan(self, latent: Tensor, start: Tensor, draws: Draws, task: Task) -> Planned:
        """Search from latents ``[E, L]`` and plans to start from, ``[E, H, A]``."""

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device)


class SearchPlanner(Planner):
    """Makes plans by a search among candidates, all of which are imagined.

    Args:
        model: The networks.
        horizon: Actions H of a plan.
        rounds: Rounds of candidates.
        number: Candidates N of each, those of the policy among them.
        elites: Of which the best K count; 0 for all.
        policy_plans: Candidates that are rollouts of the policy.
        temperature: Of the weights.
        energy: Scale and weight of the energy in the imagined reward.
    """

    _policy_rollouts = staticmethod(policy_plans)

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
        energy: EnergyScale | None = None,
    ) -> None:
        super().__init__(model, horizon=horizon)
        self.rounds = rounds
        self.number = number
        self.elites = elites
        self.policy_plans = policy_plans
        self.temperature = temperature
        self.energy = energy
        self._round = self.round

    def compile(self, name: str, *, graphs: bool = False) -> None:
        """Compile a round, and the policy's rollouts, but not all rounds together.

        On a CPU, 7 rounds together take 11 ms where one by one they take 14 (24 uncompiled), after
        twice the compiling, which grows with the rounds.
        """
        self._round = compiled(self.round, name=name, graphs=graphs)
        self._policy_rollouts = compiled(policy_plans, name=name, graphs=graphs)

    @abstractmethod
    def weigh(self, returns: Tensor) -> Tensor:
        """Return the weights of candidates with finite returns, ``[E, N]`` each."""

    def round(
        self,
        centre: Tensor,
        std: Tensor,
        noise: Tensor,
        proposals: Tensor | None,
        tails: Tensor,
        members: Tensor | None,
        latent: Tensor,
        task: Task,
    ) -> Round:
        """Make one round; see :func:`~genpol.world_model.search.weigh_candidates`.

        Args:
            centre: See there.
            std: See there.
            noise: See there.
            proposals: See there.
            tails: See :func:`imagined_return`.
            members: See there.
            latent: See there.
            task: See there.
        """
        return weigh_candidates(
            centre,
            std,
            noise,
            lambda plans: imagined_return(
                self.model, latent, plans, tails, members, task, self.energy
            ),
            self.weigh,
            proposals=proposals,
            hide=task.hide_plans,
        )

    def _drawn(
        self, rows: int, generator: torch.Generator, *, own_rounds: int
    ) -> dict[str, Tensor]:
        """Draw candidates, rollouts of the policy, tails, and the two critics of each round."""
        rounds, number, own = self.rounds, self.number, self.policy_plans
        horizon, dims = self.horizon, self.model.action_dim
        drawn = {
            "candidates": self._normal((rounds, rows, number - own, horizon, dims), generator),
            "tails": self._normal((rounds, rows, number, dims), generator),
            "explore": self._normal((rows, dims), generator),
        }
        if (members := two_critics(self.model, rounds, generator)) is not None:
            drawn["critics"] = members
        if own > 0:
            drawn["policy"] = self._normal((own_rounds, rows, own, horizon, dims), generator)
        return drawn

    def _sampler(self, latent: Tensor, draws: Draws, task: Task) -> Sampler:
        """Return what makes the rounds; the policy's rollouts of the last serve those behind it."""
        critics, noise = draws.get("critics"), draws.get("policy")
        own = None if noise is None else self._policy_rollouts(self.model, latent, noise, task)

        def sample(centre: Tensor, std: Tensor, index: int) -> Round:
            return self._round(
                centre,
                std,
                draws["candidates"][index],
                None if own is None else own[min(index, len(own) - 1)],
                draws["tails"][index],
                None if critics is None else critics[index],
                latent,
                task,
            )

        return sample


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

    def compile(self, name: str, *, graphs: bool = False) -> None:
        """Do nothing: one small network is not worth it."""

    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """See :class:`Planner`."""
        return {"explore": self._normal((rows, self.model.action_dim), generator)}

    def plan(self, latent: Tensor, start: Tensor, draws: Draws, task: Task) -> Planned:
        """See :class:`Planner`."""
        mode = self.model.act(latent, None, task).action
        explored = self.model.act(latent, draws["explore"], task).action
        return Planned(torch.zeros_like(start), mode, explored)


class MPPIPlanner(SearchPlanner):
    """Model-predictive path integral control (TD-MPC2, arXiv 2310.16828, section 3.2).

    The action is the first of an elite that is drawn by its weight, also where nothing is explored
    (official code); exploration adds noise of the fitted standard deviation. Rollouts of the policy
    are drawn once, and the temperature multiplies returns.

    Args:
        model: The networks.
        horizon: See :class:`SearchPlanner`, as all that follow.
        rounds: See there.
        number: See there.
        elites: See there.
        policy_plans: See there.
        temperature: See there.
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
        super().__init__(
            model,
            horizon=horizon,
            rounds=rounds,
            number=number,
            elites=elites,
            policy_plans=policy_plans,
            temperature=temperature,
        )
        self.least = least
        self.greatest = greatest

    def weigh(self, returns: Tensor) -> Tensor:
        """See :class:`SearchPlanner`."""
        return mppi_weights(returns, temperature=self.temperature, elites=self.elites)

    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """See :class:`Planner`."""
        drawn = self._drawn(rows, generator, own_rounds=1)
        drawn["choice"] = torch.rand(rows, 1, generator=generator, device=generator.device)
        return drawn

    def plan(self, latent: Tensor, start: Tensor, draws: Draws, task: Task) -> Planned:
        """See :class:`Planner`."""
        found = mppi(
            start,
            self._sampler(latent, draws, task),
            self.rounds,
            least=self.least,
            greatest=self.greatest,
            hide=task.hide_plans,
        )
        # The candidate at which the cumulated weight first passes a uniform draw.
        passed = found.weights.cumsum(-1) > draws["choice"] * found.weights.sum(-1, keepdim=True)
        chosen = passed.long().argmax(-1)
        rows = torch.arange(len(latent), device=latent.device)
        action = found.candidates[rows, chosen, 0]
        explored = noisy(action, found.std[:, 0] * draws["explore"], task)
        return Planned(found.plan, action, explored, found.value, found.spread)


class DiffusionPlanner(SearchPlanner):
    """Reverse diffusion over plans (MBDPO, arXiv 2605.26282).

    Rollouts of the policy are drawn anew in each round, and the temperature divides standardised
    returns.

    Args:
        model: The networks.
        horizon: See :class:`SearchPlanner`.
        schedule: Noise levels; there is one round fewer.
        number: See :class:`SearchPlanner`, as all that follow.
        elites: See there.
        policy_plans: See there.
        temperature: See there.
        action_noise: Standard deviation of exploration.
        energy: See there.
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
        super().__init__(
            model,
            horizon=horizon,
            rounds=schedule.steps - 1,
            number=number,
            elites=elites,
            policy_plans=policy_plans,
            temperature=temperature,
            energy=energy,
        )
        self.schedule = schedule
        self.action_noise = action_noise

    def weigh(self, returns: Tensor) -> Tensor:
        """See :class:`SearchPlanner`."""
        return search_weights(returns, temperature=self.temperature, elites=self.elites)

    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """See :class:`Planner`."""
        return self._drawn(rows, generator, own_rounds=self.rounds)

    def plan(self, latent: Tensor, start: Tensor, draws: Draws, task: Task) -> Planned:
        """See :class:`Planner`."""
        sample = self._sampler(latent, draws, task)
        found = reverse_diffusion(start, sample, self.schedule, hide=task.hide_plans)
        action = found.plan[:, 0]
        explored = noisy(action, self.action_noise * draws["explore"], task)
        return Planned(found.plan, action, explored, found.value, found.spread)
