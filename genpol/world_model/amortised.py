"""Search by a network: what it learns from the search, and how it acts without imagining.

The corrected objective is ours: the network predicts the weighted mean of the candidates (and not
the score), at states drawn from the batch, each with a level of its own, and at noisy plans where
the sampler goes, instead of at standard normal ones. What the released code fits is one score for
one batch element and one level per update. How many states are drawn, ``agent.score_rows``, is a
matter of time: each costs as much as a round of the search. All of the batch, ``score_rows =
batch_size``, makes the estimate of the gradient less noisy and not another one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from genpol.nn.compiling import compiled
from genpol.objectives.plan_search import SearchSchedule, expected_plan, known, search_weights
from genpol.world_model.networks import ScoreNetwork, Task, WorldModel
from genpol.world_model.planning import Draws, Planned, Planner, noisy


def denoise(
    network: ScoreNetwork,
    state: Tensor,
    start: Tensor,
    schedule: SearchSchedule,
    number: int,
    task: Task,
) -> Tensor:
    """Return plans ``[B, H, A]`` that the network denoises, without imagining anything.

    Between two neighbouring levels this is :func:`~genpol.objectives.plan_search.reverse_step` with
    the score that the prediction stands for: ``x_tau = sqrt(abar_tau) Uhat``, at any next level.

    Args:
        network: Predicts the mean of plans.
        state: Latents with embeddings, ``[B, L + d_e]``.
        start: Plan to begin from, ``[B, H, A]``.
        schedule: Noise levels.
        number: Evaluations of the network.
        task: Of each row.
    """
    plan = task.hide_plans(start)
    for level in schedule.levels(number):
        x = schedule.alpha_bar[level] ** 0.5 * plan
        levels = torch.full((len(x),), level, device=x.device)
        plan = task.hide_plans(network(state, x, levels))
    return plan


def noisy_plans(
    clean: Tensor, levels: Tensor, noise: Tensor, schedule: SearchSchedule
) -> tuple[Tensor, Tensor]:
    """Return ``x = sqrt(abar) U + sqrt(1 - abar) eps`` ``[B, H, A]``, and ``abar`` ``[B, 1, 1]``.

    Args:
        clean: Plans U, ``[B, H, A]``.
        levels: int64 ``[B]``.
        noise: Standard normal, ``[B, H, A]``.
        schedule: Noise levels.
    """
    alpha_bar = clean.new_tensor(schedule.alpha_bar)[levels].view(-1, 1, 1)
    return alpha_bar.sqrt() * clean + (1.0 - alpha_bar).sqrt() * noise, alpha_bar


@torch.no_grad()
def searched_means(
    x: Tensor,
    alpha_bar: Tensor,
    returns: Callable[[Tensor], Tensor],
    noise: Tensor,
    *,
    temperature: float,
    task: Task,
) -> Tensor:
    """Return the weighted mean of candidates around noisy plans, ``[B, H, A]``.

    All candidates count. Their noise is shared by the elements and comes in pairs of opposite sign:
    the network smooths over both.

    Args:
        x: ``[B, H, A]``.
        alpha_bar: Signal power of each, ``[B, 1, 1]``.
        returns: Values candidates ``[B, n, H, A]``.
        noise: Standard normal, ``[n / 2, H, A]``.
        temperature: See :func:`~genpol.objectives.plan_search.search_weights`.
        task: Of each row.
    """
    sigma = ((1.0 - alpha_bar) / alpha_bar).sqrt().unsqueeze(1)
    opposite = torch.cat((noise, -noise))
    plans = ((x / alpha_bar.sqrt()).unsqueeze(1) + sigma * opposite).clamp(-1.0, 1.0)
    plans = task.hide_plans(plans)
    weights = search_weights(known(returns(plans)), temperature=temperature)
    return expected_plan(weights, plans)


class ScorePlanner(Planner):
    """Denoises plans by the network alone.

    Args:
        model: The networks, with a score network.
        horizon: Actions H of a plan.
        schedule: Noise levels.
        steps: Evaluations of the network.
        action_noise: Standard deviation of exploration.
    """

    def __init__(
        self,
        model: WorldModel,
        *,
        horizon: int,
        schedule: SearchSchedule,
        steps: int,
        action_noise: float,
    ) -> None:
        super().__init__(model, horizon=horizon)
        self.schedule = schedule
        self.steps = steps
        self.action_noise = action_noise
        self._denoise = denoise

    def compile(self, name: str, *, graphs: bool = False) -> None:
        """See :class:`~genpol.world_model.planning.Planner`."""
        self._denoise = compiled(denoise, name=name, graphs=graphs)

    def draw(self, rows: int, generator: torch.Generator) -> Draws:
        """See :class:`~genpol.world_model.planning.Planner`."""
        return {"explore": self._normal((rows, self.model.action_dim), generator)}

    def plan(self, latent: Tensor, start: Tensor, draws: Draws, task: Task) -> Planned:
        """See :class:`~genpol.world_model.planning.Planner`."""
        network = self.model.score
        assert network is not None
        state = self.model.state(latent, task)
        plan = self._denoise(network, state, start, self.schedule, self.steps, task)
        action = plan[:, 0]
        return Planned(plan, action, noisy(action, self.action_noise * draws["explore"], task))
