"""Behaviour cloning with a flow or a diffusion model.

The flow learns ``mean |v(s, x_t, t) - (a - eps)|^2`` on ``x_t = (1 - t) eps + t a`` (Lipman et al.
2023, arXiv 2210.02747), the diffusion model the noise in a noised action (Diffusion Policy, Chi et
al. 2023, arXiv 2303.04137). With ``horizon`` above 1 it models chunks of actions, of which
``action_steps`` are carried out before the next is made. Steps beyond a trajectory's end are
masked. Acting draws fresh noise for every chunk.

With goals in the data and the environment (``env.goal_conditioned=true agent.goal_conditioned=
true``) the model is conditioned on the goal, which is left out of a share of the rows
(``goal_dropout``); ``agent.goal_weight`` is then classifier-free (Ho & Salimans 2022, arXiv
2207.12598): 1 is the conditioned model, above 1 the goal is exaggerated. ``genpol eval RUN
guidance.critic=<run> guidance.weight=0.04`` lets another agent's critic guide it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from genpol import settings as check
from genpol.agent import Specs
from genpol.data.goals import GoalSettings
from genpol.data.windows import WindowSpec
from genpol.errors import ConfigError
from genpol.nn.normalizer import RunningNormalizer
from genpol.offline import Draws, OfflineAgent, Windows, make_denoiser
from genpol.offline.behaviour import draw_imitation, draw_noise, imitation_loss, sample_chunks
from genpol.offline.settings import FlowSettings
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy
from genpol.policies.guidance import ClassifierFreePolicy, GuidanceSettings, Value
from genpol.pretrained import PolicyHolder


def _future_goals() -> GoalSettings:
    return GoalSettings(current=0.0, future=1.0, random=0.0)


@dataclass(frozen=True, kw_only=True)
class Settings(FlowSettings):
    """Hyper-parameters of behaviour cloning."""

    goal_conditioned: bool = False
    """Whether the model is told a goal."""
    goals: GoalSettings = field(default_factory=_future_goals)
    """Where the goals of training come from."""
    goal_dropout: float = 0.1
    """Share of rows that are learned without their goal, for classifier-free guidance."""
    goal_weight: float = 1.0
    """Classifier-free weight of the goal in acting: 0 ignores it, 1 is the conditioned model."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.within("agent.goal_dropout", self.goal_dropout, 0.0, 1.0)
        check.at_least("agent.goal_weight", self.goal_weight, 0.0)
        if self.goal_weight != 1.0 and self.goal_dropout == 0.0:
            raise ConfigError(
                f"agent.goal_weight = {self.goal_weight!r}: the model has never done without a "
                "goal; train it with agent.goal_dropout=0.1"
            )
        if self.goal_conditioned and self.diffusion.sampler == "ddpm":
            raise ConfigError(
                "agent.diffusion.sampler = 'ddpm': steps without noise alone can be bent towards a "
                "goal; set agent.diffusion.sampler=ddim"
            )


class BC(OfflineAgent, PolicyHolder):
    """A generative model of the actions in the data.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    settings: Settings

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        goal_dim = specs.goal_dim if settings.goal_conditioned else 0
        if settings.goal_conditioned and goal_dim == 0:
            raise ConfigError(
                "agent.goal_conditioned = True: the environment states no goal; set "
                "env.goal_conditioned=true where it can, or leave it false"
            )
        window = WindowSpec(
            steps=settings.horizon,
            gamma=settings.gamma,
            edges="whole" if goal_dim else "mask",
            goals=settings.goals if goal_dim else None,
            rewards=False,
        )
        super().__init__(settings, specs, window=window, device=device, seed=seed)
        self._goal_dim = goal_dim
        self._guides: tuple[OfflineAgent, ...] = ()  # in a tuple: another agent, no part of this
        # A goal stands behind the observation, with a flag that tells whether it is given.
        width = specs.observation_dim + (goal_dim + 1 if goal_dim else 0)
        self.flow = make_denoiser(width, specs.action_dim, settings, self.generator)
        self.begin(plan_steps=settings.horizon, goal=goal_dim > 0)

    @property
    def behaviour(self) -> FlowPolicy | DiffusionPolicy:
        """See :class:`~genpol.pretrained.PolicyHolder`; a goal would be part of the observation."""
        if self._goal_dim:
            raise ConfigError("a goal-conditioned policy cannot go on as another agent's")
        return self.flow

    @property
    def observation_normalizer(self) -> RunningNormalizer:
        """See :class:`~genpol.pretrained.PolicyHolder`."""
        return self.normalizer

    def draw(self, rows: int) -> Draws:
        """See :class:`~genpol.offline.OfflineAgent`."""
        generator, draws = self.generator, {}
        if self._goal_dim:
            draws["dropout"] = torch.rand(rows, 1, generator=generator, device=generator.device)
        return draws | draw_imitation(self.flow, rows, self.specs.action_dim, generator)

    def loss(self, batch: Windows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        observation = self.encode(batch["observation"])
        if self._goal_dim:
            given = (draws["dropout"] >= self.settings.goal_dropout).to(observation.dtype)
            observation = torch.cat((observation, batch["goal"] * given, given), dim=-1)
        return imitation_loss(self.flow, observation, batch["action"], batch["valid"], draws)

    def plan_noise(self, rows: int, generator: torch.Generator) -> Tensor:
        """See :class:`~genpol.offline.OfflineAgent`; that of the steps stands behind."""
        shape = (rows, self.flow.num_draws * self.plan_steps, self.specs.action_dim)
        return draw_noise(shape, self.guidance.best_of, generator)

    def guide(self, guidance: GuidanceSettings, critic: OfflineAgent | None = None) -> None:
        """See :class:`~genpol.offline.OfflineAgent`; the critic is another agent's."""
        if critic is None:
            raise ConfigError(
                "guidance: behaviour cloning has no critic; add guidance.critic=<run of iql or qgf>"
            )
        if guidance.weight > 0 and self.flow.num_draws > 1:
            raise ConfigError(
                "guidance.weight: bends steps without noise, but agent.diffusion.sampler = 'ddpm'; "
                "take guidance.best_of, or a policy with the sampler ddim"
            )
        theirs, own = _kind(critic), _kind(self)
        if theirs != own:
            raise ConfigError(
                f"guidance.critic: values {theirs}, but this agent makes {own}; train both alike"
            )
        if critic.told_goal and not self.told_goal:
            raise ConfigError(
                "guidance.critic: its values are of a goal, which this agent is not told; train it "
                "with agent.goal_conditioned=true"
            )
        self.guidance, self._guides = guidance, (critic,)

    def act(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """See :class:`~genpol.offline.OfflineAgent`."""
        if not self._guides:
            return super().act(observation, generator)
        (critic,) = self._guides
        width = None if critic.told_goal else self.specs.observation_dim
        seen = critic.encode(observation[..., :width])

        def value(_: Tensor, chunk: Tensor) -> Tensor:
            # Each agent knows actions by a scale of its own.
            action = self.action_shift + self.action_scale * chunk
            return critic.value(seen, critic.own_actions(action))

        noise = self.plan_noise(len(observation), generator)
        return self._plan(self.encode(observation), noise, value)

    def plan(self, observation: Tensor, noise: Tensor) -> Tensor:
        """See :class:`~genpol.offline.OfflineAgent`."""
        return self._plan(observation, noise, None)

    @torch.no_grad()
    def _plan(self, observation: Tensor, noise: Tensor, value: Value | None) -> Tensor:
        if not self._goal_dim:
            return sample_chunks(self.flow, observation, noise, value=value, guidance=self.guidance)
        observation = torch.cat((observation, torch.ones_like(observation[:, :1])), dim=-1)
        model = ClassifierFreePolicy(
            self.flow, self._without_goal, weight=self.settings.goal_weight
        )
        return sample_chunks(model, observation, noise, value=value, guidance=self.guidance)

    def _without_goal(self, observation: Tensor) -> Tensor:
        state, goal = observation.split([self.specs.observation_dim, self._goal_dim + 1], dim=-1)
        return torch.cat((state, torch.zeros_like(goal)), dim=-1)


def _kind(agent: OfflineAgent) -> str:
    specs = agent.specs
    return (
        f"chunks of {agent.plan_steps} actions of width {specs.action_dim} at observations of "
        f"width {specs.observation_dim}"
    )


AGENT = BC
