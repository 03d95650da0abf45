"""Model-based diffusion policy optimisation: TD-MPC2 with reverse diffusion over plans.

Cheng et al. 2026 (arXiv 2605.26282). Model, critics and policy prior are those of
:mod:`genpol.agents.tdmpc2`. MPPI is replaced by the T - 1 steps of a diffusion whose score is
estimated from imagined rollouts::

    w = softmax(standardised J / lambda), over the best of N draws of N(x / sqrt(abar), sigma^2)
    s = (sqrt(abar) sum_i w_i U_i - x) / (1 - abar);   x <- (x + (1 - abar) s) / sqrt(alpha)

and the imagined reward has ``eta F_norm(z, a)`` besides, where the classifier F tells actions of
the replay from the policy's, noisy and random ones: an anchor to behaviour of strength
``eta / lambda``.

The paper's text was not to be had: what follows is its official code, but for these. The pairs that
F learns from are paired rightly (``legacy_pairing`` mixes them up as released). The energy counts
only after ``energy_warmup`` updates, and its scale is saved with the model. The widest proposal
stays 0.33 for any number of steps (``widest_search``), two random critics make the target
(``target_critics=first`` as released), and ``energy_weight=0`` leaves F out. The score network
learns the weighted mean of plans where its sampler goes (:mod:`genpol.world_model.amortised`).
The paper argues that the critics should evaluate what acts; which target it means is not known.
``value_target=search`` asks the search itself, ``score`` the network that has learned it, and
``replay`` what was done; the default, ``pi``, is what the released code trains with. Images are not
seen: their convolutional encoder is left out.

As published: ``size=6M diffusion_steps=20 num_plans=512 num_elites=64 num_policy_plans=24``. Its
curves count actions where TD-MPC2's count environment steps. Its three uses are recipes, for
TD-MPC2 as well: ``recipe=world-model-online``, ``world-model-pretraining`` (data of several tasks)
and ``world-model-finetuning`` (online from there).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genpol import settings as check
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.nn.masked import weighted_mean
from genpol.objectives.plan_search import SearchSchedule, search_schedule
from genpol.objectives.world_model import as_pairs, density_ratio_loss, hardest
from genpol.world_model import (
    DiffusionPlanner,
    EnergyScale,
    Planner,
    PolicyPlanner,
    ScorePlanner,
    Task,
    Window,
    WorldModelAgent,
    WorldModelSettings,
    check_candidates,
)
from genpol.world_model.amortised import denoise, noisy_plans, searched_means
from genpol.world_model.planning import Draws, imagined_return, two_critics

VALUE_TARGETS = ("pi", "replay", "score", "search")


@dataclass(frozen=True, kw_only=True)
class Settings(WorldModelSettings):
    """Hyper-parameters of MBDPO."""

    act: str = "search"
    """What acts: the `search`, the `score` network by itself, or the `policy` prior."""
    value_target: str = "pi"
    """Next action of the critics' target: of the policy (`pi`, as released), the one of the
    `replay`, the `score` network's, or that of a small `search` (slow)."""
    diffusion_steps: int = 8
    """Noise levels T; a search takes T - 1 rounds of candidates (published: 20)."""
    widest_search: float = 0.3266
    """Standard deviation of the first round's candidates, for any number of levels."""
    num_plans: int = 64
    """Candidates of each round, those of the policy among them (published: 512)."""
    num_elites: int = 16
    """Of which the best count (published: 64); 0 for all."""
    temperature: float = 0.5
    """Softmax temperature of standardised returns."""
    action_noise: float = 0.05
    """Standard deviation of exploration."""
    energy_weight: float = 0.01
    """Weight of the energy in imagined rewards; 0 leaves the classifier out."""
    energy_loss_weight: float = 1.0
    """Weight of the classifier's loss."""
    energy_clip: float = 5.0
    """Bound of the standardised energy."""
    energy_momentum: float = 0.99
    """Of the averages that standardise it."""
    energy_warmup: int = 1000
    """Updates before the energy counts."""
    negative_noise: float = 0.5
    """Standard deviation of the noise on the policy's actions that F learns to tell."""
    legacy_pairing: bool = False
    """Whether F learns from states and actions that are mixed up, as in the released code."""
    score_network: bool = False
    """Whether a network learns the search."""
    score_loss_weight: float = 1.0
    """Weight of its loss."""
    score_rows: int = 16
    """States of each batch, drawn anew, that are searched for it; as many as the batch has at
    most."""
    score_samples: int = 64
    """Candidates of each, an even number."""
    score_steps: int = 4
    """Evaluations of the network for one plan."""
    target_plans: int = 64
    """Candidates of each round, with `value_target=search`."""
    target_steps: int = 5
    """Noise levels, with `value_target=search`."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.act", self.act, ("search", "score", "policy"))
        check.one_of("agent.value_target", self.value_target, VALUE_TARGETS)
        for name in ("diffusion_steps", "target_steps", "score_samples"):
            check.at_least(f"agent.{name}", getattr(self, name), 2)
        if self.score_samples % 2:
            raise ConfigError(
                f"agent.score_samples = {self.score_samples}: must be even, for candidates come in "
                "pairs of opposite noise"
            )
        for name in ("score_rows", "score_steps"):
            check.at_least(f"agent.{name}", getattr(self, name), 1)
        for name in ("temperature", "widest_search", "energy_clip"):
            check.positive(f"agent.{name}", getattr(self, name))
        for name in (
            *("action_noise", "energy_weight", "energy_loss_weight", "energy_warmup"),
            *("negative_noise", "score_loss_weight"),
        ):
            check.at_least(f"agent.{name}", getattr(self, name), 0)
        check.within("agent.energy_momentum", self.energy_momentum, 0.0, 1.0)
        check.within("agent.num_elites", self.num_elites, 0, self.num_plans)
        check_candidates(self.num_plans, self.num_policy_plans)
        check_candidates(self.target_plans, self.num_policy_plans, field="target_plans")
        for name in ("act", "value_target"):
            if getattr(self, name) == "score" and not self.score_network:
                raise ConfigError(f"agent.{name} = 'score': needs agent.score_network=true")


class MBDPO(WorldModelAgent):
    """Model-based diffusion policy optimisation.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights, exploration and noise.
    """

    settings: Settings

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        energy = None
        if settings.energy_weight > 0:
            energy = EnergyScale(
                settings.energy_weight,
                momentum=settings.energy_momentum,
                clip=settings.energy_clip,
                warmup=settings.energy_warmup,
            )
        super().__init__(
            settings,
            specs,
            device=device,
            seed=seed,
            energy=energy,
            score=settings.score_network,
        )
        self.schedule = self._schedule(settings.diffusion_steps)
        self._target_planner = self._searcher(
            self._schedule(settings.target_steps), settings.target_plans
        )
        self.begin(self._acting_planner())

    def _schedule(self, steps: int) -> SearchSchedule:
        return search_schedule(steps, widest=self.settings.widest_search)

    def _searcher(self, schedule: SearchSchedule, number: int) -> DiffusionPlanner:
        settings = self.settings
        return DiffusionPlanner(
            self.model,
            horizon=settings.horizon,
            schedule=schedule,
            number=number,
            elites=settings.num_elites,
            policy_plans=settings.num_policy_plans,
            temperature=settings.temperature,
            action_noise=settings.action_noise,
            energy=self.energy_scale,
        )

    def _acting_planner(self) -> Planner:
        settings = self.settings
        if settings.act == "policy":
            return PolicyPlanner(self.model, horizon=settings.horizon)
        if settings.act == "score":
            return ScorePlanner(
                self.model,
                horizon=settings.horizon,
                schedule=self.schedule,
                steps=settings.score_steps,
                action_noise=settings.action_noise,
            )
        return self._searcher(self.schedule, settings.num_plans)

    def draw(self, window: Window) -> dict[str, Tensor]:
        """See :class:`~genpol.world_model.agent.WorldModelAgent`."""
        drawn = super().draw(window)
        settings = self.settings
        horizon, rows, dims = window.actions.shape
        if self.model.energy is not None:
            uniform = torch.rand(
                (horizon * rows, dims), generator=self.generator, device=self.generator.device
            )
            drawn |= {
                "negative_policy": self.normal(horizon * rows, dims),
                "negative_noise": self.normal(horizon * rows, dims),
                "negative_uniform": 2.0 * uniform - 1.0,
            }
        if self.model.score is not None:
            chosen = self.some_rows(settings.score_rows, rows)
            drawn |= {"score_rows": chosen, **self._score_draws(len(chosen), horizon, dims)}
        if settings.value_target == "search":
            searched = self._target_planner.draw(horizon * rows, self.generator)
            drawn |= {f"search_{name}": x for name, x in searched.items()}
        return drawn

    def _score_draws(self, rows: int, horizon: int, dims: int) -> dict[str, Tensor]:
        half, device = self.settings.score_samples // 2, self.generator.device
        levels = torch.randint(
            1, self.schedule.steps, (rows,), generator=self.generator, device=device
        )
        drawn = {
            "score_level": levels,
            "score_own": torch.rand(rows, 1, 1, generator=self.generator, device=device) < 0.5,
            "score_noise": self.normal(rows, horizon, dims),
            "score_candidates": self.normal(half, horizon, dims),
            "score_tails": self.normal(2 * half, dims),
        }
        if (members := two_critics(self.model, 1, self.generator)) is not None:
            drawn["score_critics"] = members[0]
        return drawn

    def next_action(self, encoded: Tensor, window: Window, draws: Draws, task: Task) -> Tensor:
        """See :class:`~genpol.world_model.agent.WorldModelAgent`."""
        which = self.settings.value_target
        if which in ("pi", "replay"):
            own = super().next_action(encoded, window, draws, task)
            if which == "pi":
                return own
            taken = torch.where(window.valid[1:].unsqueeze(-1), window.actions[1:], own[:-1])
            return torch.cat((taken, own[-1:]))
        latent, start = encoded.flatten(0, 1), window.following().flatten(0, 1)
        task = task.tile(len(encoded))
        if which == "score":
            assert self.model.score is not None
            state, steps = self.model.state(latent, task), self.settings.score_steps
            plan = denoise(self.model.score, state, start, self.schedule, steps, task)
            return plan[:, 0].view(*encoded.shape[:2], -1)
        own_draws = {
            name.removeprefix("search_"): x
            for name, x in draws.items()
            if name.startswith("search_")
        }
        found = self._target_planner.plan(latent, start, own_draws, task)
        return found.action.view(*encoded.shape[:2], -1)

    def further_loss(
        self, latents: Tensor, window: Window, draws: Draws, task: Task
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """See :class:`~genpol.world_model.agent.WorldModelAgent`."""
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        if self.model.energy is not None:
            loss, besides = self.energy_loss(latents[:-1], window, draws, task)
            losses.append(self.settings.energy_loss_weight * loss)
            metrics |= besides
        if self.model.score is not None:
            loss = self.score_loss(latents[0], window, draws, task)
            losses.append(self.settings.score_loss_weight * loss)
            metrics["loss/score"] = loss.detach()
        return (torch.stack(losses).sum() if losses else None), metrics

    def energy_loss(
        self, latents: Tensor, window: Window, draws: Draws, task: Task
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of F, whose negatives are the hardest of three, and metrics.

        Args:
            latents: Constants, ``[H, B, L]``.
            window: Of the actions that were taken there.
            draws: Of :meth:`draw`.
            task: Of each row.
        """
        model = self.model
        assert model.energy is not None
        latent, taken = as_pairs(latents, window.actions, legacy=self.settings.legacy_pairing)
        task = task.tile(len(latents))
        with torch.no_grad():
            own = model.act(latent, draws["negative_policy"], task).action
            beside = own + self.settings.negative_noise * draws["negative_noise"]
            candidates = torch.stack((own, beside.clamp(-1.0, 1.0), draws["negative_uniform"]))
            candidates = task.hide(candidates)
            among = latent.expand(len(candidates), *latent.shape)
            logits = model.energy(model.pair(among, candidates, task)).squeeze(-1)
            negative = hardest(logits, candidates)
        both = torch.stack((taken, negative))
        logits = model.energy(model.pair(latent.expand(2, *latent.shape), both, task)).squeeze(-1)
        valid = window.valid.flatten()
        loss, accuracy = density_ratio_loss(logits[0], logits[1], valid)
        pooled = logits.detach()
        mean = weighted_mean(pooled, valid)
        return loss, {
            "loss/energy": loss.detach(),
            "energy/accuracy": accuracy,
            "energy/mean": mean,
            "energy/std": weighted_mean((pooled - mean).square(), valid).sqrt(),
        }

    def score_loss(self, latent: Tensor, window: Window, draws: Draws, task: Task) -> Tensor:
        """Return the squared error of the network's mean plans beside the searched ones.

        Args:
            latent: Where plans begin; constants, ``[B, L]``.
            window: Of the actions that were taken from there on.
            draws: Of :meth:`draw`.
            task: Of each row.
        """
        model, network = self.model, self.model.score
        assert network is not None
        levels, chosen = draws["score_level"], draws["score_rows"]
        rows = len(levels)
        latent, task = latent[chosen], task.rows(chosen)
        state = model.state(latent, task)
        with torch.no_grad():
            taken = window.actions[:, chosen].transpose(0, 1)
            steps = self.settings.score_steps
            own = denoise(network, state, torch.zeros_like(taken), self.schedule, steps, task)
            clean = torch.where(draws["score_own"], own, taken)
            x, alpha_bar = noisy_plans(clean, levels, draws["score_noise"], self.schedule)
            x = task.hide_plans(x)
            tails = draws["score_tails"].expand(rows, -1, -1)
            wanted = searched_means(
                x,
                alpha_bar,
                lambda plans: imagined_return(
                    model, latent, plans, tails, draws.get("score_critics"), task, self.energy_scale
                ),
                draws["score_candidates"],
                temperature=self.settings.temperature,
                task=task,
            )
        predicted = task.hide_plans(network(state, x, levels))
        return (predicted - wanted).square().mean()


AGENT = MBDPO
