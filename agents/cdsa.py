"""CDSA-style correction: what nudges the actions of *other* policies towards the data.

Conservative Denoising Score-based Algorithm, Liu et al. 2024 (arXiv 2406.07541). Published, as far
as could be consulted (abstract and summaries): a score model of the data's density, an
inverse-dynamics model that turns its state part into an auxiliary action, and a plug-in correction
of policies that are not trained anew. **Reconstruction**: losses, levels, networks, step and
coefficients; see :mod:`genpol.policies.density` for the models and
:mod:`genpol.policies.correction` for the step. Rewards are not read.

A run of this agent is what ``genpol eval RUN corrector=cdsa:<this run>`` asks for. The averaged
score model is used there. The last ``holdout`` of the trajectories are learned from by neither
model, for the choice of a step; where data of several policies lie one after the other, they are
the last one's. Both models standardise for themselves and see raw observations.

A policy that already is the behaviour's mean should be left as it is: on a linear-quadratic task
one step changed its return by 0.1 % with ``noise_on=action``, and by 2 % with ``joint``, whose
action block is blurred over neighbouring states.

Acting by itself (which is what a run's evaluations show) it is a crude clone: from the mean action
of the data it climbs the density at that state, level by level, without noise
(:func:`~genpol.policies.correction.climb`).

Deviations from our specification: one step size without decay, since averaging has its effect; 3 x
256 and 2 x 256 and a batch of 256 for two cores (there: 4 x 512, 3 x 512, 1024); no dropout; the
state behind a task's end is learned from, but for copies of the last one. Forward models as the
states' anchor, annealed steps, and a guard on values are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from genpol import settings as check
from genpol.agent import Specs
from genpol.data.dataset import OfflineDataset
from genpol.data.windows import WindowSpec, training_trajectories
from genpol.errors import ConfigError
from genpol.nn.normalizer import RunningNormalizer
from genpol.offline import Draws, NetworkSettings, OfflineAgent, OfflineSettings, Windows
from genpol.policies.correction import ScoreCorrector, climb
from genpol.policies.density import NOISE_ON, DenoisingScore, InverseDynamics


def _inverse_dynamics() -> NetworkSettings:
    return NetworkSettings(hidden=[256, 256], activation="relu", layer_norm="none", init="lecun")


def _score() -> NetworkSettings:
    return NetworkSettings(activation="silu", layer_norm="before", init="lecun")


@dataclass(frozen=True, kw_only=True)
class Settings(OfflineSettings):
    """Hyper-parameters of the corrector."""

    run_defaults: ClassVar[Mapping[str, Any]] = {
        **OfflineSettings.run_defaults,
        "total_steps": 100_000,
    }

    noise_on: str = "joint"
    """What is noised: `joint`, states and actions; or `action`, for actions at exactly the state,
    without correction of states."""
    num_levels: int = 10
    """Noise levels, geometric."""
    max_noise: float = 0.5
    """The highest, in units of the data's spread."""
    min_noise: float = 0.02
    """The lowest."""
    polyak: float = 0.001
    """Share of the live score model in every update of the averaged one."""
    holdout: float = 0.05
    """Share of the trajectories, the last ones, that is kept for the choice of a step."""
    actor: NetworkSettings = field(default_factory=_inverse_dynamics)
    """Network of the inverse dynamics, which makes actions."""
    critic: NetworkSettings = field(default_factory=_score)
    """Network of the score, which judges them."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.noise_on", self.noise_on, NOISE_ON)
        check.at_least("agent.num_levels", self.num_levels, 1)
        check.positive("agent.min_noise", self.min_noise)
        check.at_least("agent.max_noise", self.max_noise, self.min_noise)
        check.within("agent.polyak", self.polyak, 0.0, 1.0)
        check.within("agent.holdout", self.holdout, 0.0, 0.5)
        if self.horizon != 1:
            raise ConfigError(
                f"agent.horizon = {self.horizon!r}: single actions are corrected; leave it at 1 "
                "(policies that plan chunks are corrected action by action)"
            )
        if self.normalize_observations:
            raise ConfigError(
                "agent.normalize_observations = True: cdsa standardises states and actions anyway; "
                "leave it false"
            )


class CDSA(OfflineAgent):
    """A score model of the data and an inverse-dynamics model.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    settings: Settings

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        window = WindowSpec(gamma=settings.gamma, rewards=False, holdout=settings.holdout)
        super().__init__(settings, specs, window=window, device=device, seed=seed)
        sizes, layers = (specs.observation_dim, specs.action_dim), settings.critic
        self.score = DenoisingScore(
            *sizes,
            layers.hidden,
            noise_on=settings.noise_on,
            num_levels=settings.num_levels,
            max_noise=settings.max_noise,
            min_noise=settings.min_noise,
            activation=layers.activation,
            layer_norm=layers.layer_norm,
            init=layers.init,
            generator=self.generator,
        )
        self.averaged = copy.deepcopy(self.score).requires_grad_(False)
        self.inverse_dynamics: InverseDynamics | None = None
        if settings.noise_on == "joint":  # otherwise no state is displaced
            layers = settings.actor
            self.inverse_dynamics = InverseDynamics(
                *sizes,
                layers.hidden,
                activation=layers.activation,
                layer_norm=layers.layer_norm,
                init=layers.init,
                generator=self.generator,
            )
        self.begin(plan_steps=1)

    def corrector(self) -> ScoreCorrector:
        """Return what corrects other policies: the averaged score and the inverse dynamics."""
        return ScoreCorrector(self.averaged, self.inverse_dynamics)

    def prepare(self, dataset: OfflineDataset) -> None:
        """Take the statistics of the trajectories that are learned from."""
        # Weights that were loaded go with the statistics that came with them.
        if self.score.standardizer.fitted:
            return
        width, device = self.specs.observation_dim, self.generator.device
        both = RunningNormalizer(width + self.specs.action_dim).to(device)
        moves = RunningNormalizer(width).to(device)
        for state, action, following in _transitions(dataset, self.settings.holdout):
            y = np.concatenate((state, action), axis=-1)
            both.update(torch.from_numpy(y).to(device))
            moves.update(torch.from_numpy(following - state).to(device))
        for score in (self.score, self.averaged):
            score.set_statistics(both.mean, both.std)
        if self.inverse_dynamics is not None:
            self.inverse_dynamics.set_statistics(
                both.mean[:width], both.std[:width], moves.mean, moves.std
            )

    def draw(self, rows: int) -> Draws:
        """See :class:`~genpol.offline.OfflineAgent`."""
        options: dict[str, Any] = {"generator": self.generator, "device": self.generator.device}
        return {
            "noise": torch.randn(rows, self.score.noise_dim, **options),
            "level": torch.randint(self.settings.num_levels, (rows,), **options),
        }

    def loss(self, batch: Windows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        observation, action = batch["observation"], batch["action"].squeeze(1)
        total, metrics = self.score.loss(observation, action, draws["noise"], draws["level"])
        if self.inverse_dynamics is not None:
            following = batch["next", "observation"]
            loss, more = self.inverse_dynamics.loss(observation, following, action)
            total, metrics = total + loss, metrics | more
        return total, metrics

    def averages(self) -> Iterable[tuple[nn.Module, nn.Module, float]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        yield self.averaged, self.score, self.settings.polyak

    def plan_noise(self, rows: int, generator: torch.Generator) -> Tensor:
        """Return nothing; see :class:`~genpol.offline.OfflineAgent`."""
        return torch.empty(0, device=generator.device)

    @torch.no_grad()
    def plan(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Return the actions to which :func:`climb` leads, ``[B, 1, A]``; the noise is unused."""
        score = self.averaged
        start = score.mean_action(observation).clamp(-1.0, 1.0)
        return climb(score, observation, start, score.levels.tolist()).unsqueeze(1)


def _transitions(
    dataset: OfflineDataset, holdout: float, block: int = 100_000
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield states, actions and next states of all that is learned from, in blocks."""
    kept = training_trajectories(dataset.num_trajectories, holdout)
    number = int((dataset.ends - dataset.starts)[:kept].sum())
    observation, action = dataset.columns["observation"], dataset.columns["action"]
    for start in range(0, number, block):
        rows = dataset.transition_row(np.arange(start, min(start + block, number)))
        yield observation[rows], action[rows], observation[rows + 1]


AGENT = CDSA
