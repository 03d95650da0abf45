"""Fisher Decorator (FiDec): samples of a cloned flow, shifted up the value at a price in nats.

Cheng et al. 2026 (arXiv 2604.17919). A flow is cloned from the data; a residual network shifts each
of its samples, ``a' = clip(a + delta(s, a))``; critics are those of FQL
(:mod:`genpol.offline.flow_critic`). The residual raises the value and pays for leaving behaviour by
the quadratic form of the **Fisher matrix** of behaviour's scores (:mod:`genpol.policies.score`)::

    loss = lambda * mean(delta^T F(s) delta) / T - c Q(s, a + delta),    KL ~ delta^T F delta / 2

so that the best small displacement is the natural gradient ``F^-1 grad Q``: far along directions in
which the data vary, hardly along those in which they do not. ``T`` is the running mean of ``tr F``
over all states. It keeps ``lambda`` of the order of the value whatever the data's scale, and is
divided out of the budget, so that this one is in nats: ``lambda`` rises while the mean divergence
exceeds ``budget``.

``metric`` names the estimate:

============= ==================================================================================
``sampled``   K scores at noised samples of the flow for each state: its Fisher matrix
``hessian``   the curvature of the log-density at the noised action itself: modes stay apart
``point``     the score at the action itself, of rank one (the paper's)
``released``  as ``sampled``, with ``v / (1 - t)`` for the score (the released code's mistake)
``euclidean`` the identity: DeFlow's penalty (arXiv 2601.10471), for the ablation
============= ==================================================================================

Replication of the released code: ``metric=released normalizer=state budget_unit=trace budget=0.001
multiplier_learning_rate=3e-4 zero_init=false max_grad_norm=5`` (budgets by data set there: 0.001
cubes and scenes, 0.005 puzzles, 0.01 ant mazes).

Deviations: the exact score ``(t v - x) / (1 - t)``, whose size in the action's units makes the
divergence one in nats; ``tr F`` averaged over states, because a state's own, from few scores, makes
an anisotropic matrix look round; a residual that begins at zero, which is the cloned policy; a step
size of its own for ``lambda`` (Adam at 3e-4 takes 3,300 updates per factor of e), which is kept
between 1e-3 and 1e6. Networks as in ``agent=fql``. ``metric_rows`` may estimate the metric for some
rows of a batch only: with K = 8 and ten steps it is most of an update.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from genpol import settings as check
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.nn.optimizer import GuardedOptimizer
from genpol.objectives.actor_critic import temperature_loss
from genpol.offline.behaviour import draw_noise, sample_chunks
from genpol.offline.chunk_agent import Draws, Windows
from genpol.offline.flow_critic import FlowCriticAgent, FlowCriticSettings
from genpol.offline.networks import ChunkNetwork
from genpol.policies.flow import FlowPolicy
from genpol.policies.score import (
    Metric,
    action_score,
    curvature_metric,
    euclidean_metric,
    point_metric,
    released_score,
    sampled_metric,
)

METRICS = ("sampled", "hessian", "point", "released", "euclidean")
MULTIPLIERS = (1e-3, 1e6)
"""Bounds of ``lambda``."""
_TRACE_SHARE = 0.01  # of a batch in the running mean of the trace
_EPS = 1e-6


def _times() -> list[float]:
    return [0.85, 0.90]


@dataclass(frozen=True, kw_only=True)
class Settings(FlowCriticSettings):
    """Hyper-parameters of Fisher Decorator."""

    metric: str = "sampled"
    """What a displacement costs: `sampled`, `hessian`, `point`, `released` or `euclidean`."""
    num_scores: int = 8
    """Scores K of each state, for `sampled` and `released`."""
    score_time: list[float] = field(default_factory=_times)
    """Least and largest time at which scores are taken."""
    damping: float = 1e-3
    """Added to every eigenvalue of the metric."""
    normalizer: str = "global"
    """Whose trace is divided out: the `global` running mean, or that of each `state`."""
    metric_rows: int = 0
    """Rows of a batch whose metric is estimated; 0 for all."""
    budget: float = 0.1
    """Divergence from behaviour that is spent."""
    budget_unit: str = "nats"
    """Unit of the budget: `nats`, or `trace`, the quadratic form over the trace (with `euclidean`:
    squared distance per dimension)."""
    initial_multiplier: float = 10.0
    """`lambda` at the beginning."""
    multiplier_learning_rate: float = 1e-3
    """Adam step size of its logarithm."""
    normalize_q: bool = False
    """Whether the value's mean size is divided out of the residual's loss."""
    zero_init: bool = True
    """Whether the residual begins at zero, hence at the cloned policy."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.metric", self.metric, METRICS)
        check.one_of("agent.normalizer", self.normalizer, ("global", "state"))
        check.one_of("agent.budget_unit", self.budget_unit, ("nats", "trace"))
        check.at_least("agent.num_scores", self.num_scores, 1)
        check.at_least("agent.damping", self.damping, 0.0)
        check.within("agent.metric_rows", self.metric_rows, 0, self.batch_size)
        check.within("agent.initial_multiplier", self.initial_multiplier, *MULTIPLIERS)
        for name in ("budget", "multiplier_learning_rate"):
            check.positive(f"agent.{name}", getattr(self, name))
        if len(self.score_time) != 2 or not 0.0 < self.score_time[0] <= self.score_time[1] < 1.0:
            raise ConfigError(
                f"agent.score_time = {self.score_time!r}: must be two increasing times within "
                "(0, 1), such as [0.85,0.9]"
            )
        if self.denoiser != "flow":
            raise ConfigError(
                f"agent.denoiser = {self.denoiser!r}: Fisher Decorator takes the scores of a flow; "
                "set agent.denoiser=flow"
            )
        if self.budget_unit == "nats" and (
            self.metric in ("euclidean", "point", "released") or self.normalizer == "state"
        ):
            raise ConfigError(
                "agent.budget_unit = 'nats': has no meaning with agent.metric=euclidean, point or "
                "released, nor with agent.normalizer=state; set agent.budget_unit=trace and "
                "agent.budget=0.001"
            )


class FisherDecorator(FlowCriticAgent):
    """A flow of behaviour, a residual on its samples, and a price for leaving behaviour.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    settings: Settings
    trace: Tensor

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        super().__init__(settings, specs, device=device, seed=seed)
        self.residual = ChunkNetwork(
            specs.observation_dim,
            specs.action_dim,
            settings.horizon,
            settings.actor,
            chunk_input=True,
            zero_init=settings.zero_init,
            generator=self.generator,
        )
        self.log_multiplier = nn.Parameter(torch.tensor(math.log(settings.initial_multiplier)))
        self.register_buffer("trace", torch.zeros(()))  # running mean of tr F; 0 for none yet
        self.begin(plan_steps=settings.horizon, apart=(self.log_multiplier,))
        self._dual = GuardedOptimizer(
            [self.log_multiplier],
            settings.multiplier_learning_rate,
            max_grad_norm=math.inf,
            eps=1e-8,
            patience=settings.nonfinite_patience,
            name="multiplier",
        )

    def draw(self, rows: int) -> Draws:
        """See :class:`~genpol.offline.OfflineAgent`."""
        generator, settings = self.generator, self.settings
        draws = dict(super().draw(rows)) | {"policy": self.plan_noise(rows, generator)}
        if settings.metric == "euclidean":
            return draws
        rows = settings.metric_rows or rows
        scores = settings.num_scores if settings.metric in ("sampled", "released") else 1
        shape = (scores, rows, settings.horizon, self.specs.action_dim)
        low, high = settings.score_time
        time = torch.rand((scores, rows, 1), generator=generator, device=generator.device)
        draws["score_base"] = draw_noise(shape, 1, generator)
        draws["score_noise"] = draw_noise(shape, 1, generator)
        draws["score_time"] = low + (high - low) * time
        return draws

    def loss(self, batch: Windows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        total, metrics = super().loss(batch, draws)
        observation = self.encode(batch["observation"])
        with torch.no_grad():
            base = sample_chunks(self.flow, observation, draws["policy"])
        displacement: Tensor = self.residual(observation, base)
        values = self.critic(observation, (base + displacement).clamp(-1.0, 1.0), frozen=True)
        value, scale = values.mean(), 1.0
        if self.settings.normalize_q:
            scale = 1.0 / values.detach().abs().mean().clamp_min(_EPS)
        rows = self.settings.metric_rows or len(base)
        metric = self._metric(observation[:rows], base[:rows], displacement[:rows], draws)
        mean_trace = metric.trace.mean()
        trace = torch.where(self.trace > 0, self.trace, mean_trace)
        divided = metric.trace if self.settings.normalizer == "state" else trace
        penalty = (metric.quadratic / divided.clamp_min(_EPS)).mean()
        return total + self.multiplier * penalty - scale * value, metrics | {
            "loss/policy_value": -value.detach(),
            "fisher/penalty": penalty.detach(),
            "fisher/trace": mean_trace,
            "fisher/divergence": metric.quadratic.detach().mean() / 2,
            "policy/displacement": displacement.detach().square().mean().sqrt(),
        }

    def _metric(
        self, observation: Tensor, base: Tensor, displacement: Tensor, draws: Draws
    ) -> Metric:
        """Return what displacements ``[B, H, A]`` of samples of behaviour cost."""
        settings, flow = self.settings, self.flow
        assert isinstance(flow, FlowPolicy)
        flat = displacement.flatten(-2)
        if settings.metric == "euclidean":
            return euclidean_metric(flat)

        def own(chunk: Tensor) -> Tensor:  # a flow of single actions knows no horizon
            return chunk if settings.horizon > 1 else chunk.squeeze(-2)

        noise, time = own(draws["score_noise"]), draws["score_time"]
        damping = settings.damping
        if settings.metric == "point":
            return point_metric(flow, observation, own(base), flat, time=time[0], damping=damping)
        if settings.metric == "hessian":
            return curvature_metric(
                flow, observation, own(base), flat, noise=noise[0], time=time[0], damping=damping
            )
        with torch.no_grad():
            samples = own(sample_chunks(flow, observation, draws["score_base"]))
        return sampled_metric(
            flow,
            observation,
            samples,
            flat,
            noise=noise,
            time=time,
            damping=damping,
            score=action_score if settings.metric == "sampled" else released_score,
        )

    @property
    def multiplier(self) -> Tensor:
        """The price ``lambda`` of the penalty, which no loss of the networks changes."""
        return self.log_multiplier.detach().exp()

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Take one step on windows ``[B]``, and one of the multiplier."""
        metrics = super().update(batch)
        settings, trace = self.settings, metrics["fisher/trace"]
        if trace.isfinite():
            self.trace.lerp_(trace, _TRACE_SHARE if self.trace > 0 else 1.0)
        budget = settings.budget
        if settings.budget_unit == "nats":
            budget = 2.0 * budget / max(float(self.trace), _EPS)
        # Gradient -(penalty - budget): the price rises while too much is spent.
        loss = temperature_loss(self.log_multiplier, metrics["fisher/penalty"], -budget)
        metrics |= self._dual.step(loss)
        with torch.no_grad():
            self.log_multiplier.clamp_(*(math.log(bound) for bound in MULTIPLIERS))
        return metrics | {"fisher/multiplier": self.multiplier}

    @torch.no_grad()
    def plan(self, observation: Tensor, noise: Tensor) -> Tensor:
        """See :class:`~genpol.offline.OfflineAgent`."""
        base = sample_chunks(self.flow, observation, noise)
        displacement: Tensor = self.residual(observation, base)
        return (base + displacement).clamp(-1.0, 1.0)

    def training_state(self) -> dict[str, Any]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        return super().training_state() | {"dual": self._dual.state_dict()}

    def load_training_state(self, state: Mapping[str, Any]) -> None:
        """See :class:`~genpol.offline.OfflineAgent`."""
        super().load_training_state(dict(state))
        self._dual.load_state_dict(state["dual"])


AGENT = FisherDecorator
