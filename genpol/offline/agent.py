"""The update of agents that learn from windows of data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from genpol.agent import DatasetAgent, Specs
from genpol.data.dataset import OfflineDataset
from genpol.data.windows import WindowSpec
from genpol.errors import ConfigError
from genpol.nn.compiling import compiled
from genpol.nn.normalizer import RunningNormalizer
from genpol.nn.optimizer import GuardedOptimizer
from genpol.offline.behaviour import draw_noise
from genpol.offline.policy import PlanningPolicy
from genpol.offline.settings import OfflineSettings
from genpol.policies.guidance import GuidanceSettings
from genpol.seeding import derive

Windows = Mapping[Any, Tensor]
"""A batch of windows by key, that of the next observation being ``("next", "observation")``."""

Draws = Mapping[str, Tensor]
"""Random numbers by name."""


class OfflineAgent(DatasetAgent):
    """Adam on the sum of an agent's losses, and averaged copies of some of its networks.

    Losses that share no parameters are learned as if each had an optimiser of its own, because Adam
    treats every parameter alone. Averages take in the parameters from *before* the step, as the
    released codes of FQL, QC, DQC and QGF do; after the first update they are what they began as.

    What is random is an argument of :meth:`loss` and :meth:`plan`, which are functions of tensors
    and can be compiled.

    A subclass makes its networks and calls :meth:`begin` at the end of its constructor.

    Attributes:
        normalizer: Of observations; the identity unless the settings say otherwise.
        guidance: How a critic bends the samples of the policy, where it can.
        takes_guidance: Whether it can: whether the policy's actions are samples of its model.
        plan_steps: Actions H of a plan, and of the chunks that the critics value.
        told_goal: Whether a goal stands behind the observation.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        window: What is learned from.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    def __init__(
        self,
        settings: OfflineSettings,
        specs: Specs,
        *,
        window: WindowSpec,
        device: str,
        seed: int,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.specs = specs
        self.window = window
        self.batch_size = settings.batch_size
        self.replay_capacity = settings.replay_capacity
        self.frames_per_batch = specs.num_envs
        self.gradient_steps = 0
        self.generator = torch.Generator(device).manual_seed(seed)
        self.normalizer = RunningNormalizer(specs.observation_dim)
        self.guidance = GuidanceSettings()
        self.takes_guidance = False
        self._env_steps = 0
        self._updates_owed = 0.0
        self._acting = torch.Generator(device).manual_seed(derive(seed, "acting"))

    def begin(
        self, *, plan_steps: int, goal: bool = False, apart: Sequence[nn.Parameter] = ()
    ) -> None:
        """Move all networks to their device, and make the optimiser and the policy that acts.

        Args:
            plan_steps: Actions H of a plan.
            goal: Whether the policy is told the environment's goal.
            apart: Parameters that the agent trains in another way.
        """
        self.to(self.generator.device)
        settings = self.settings
        self.plan_steps = plan_steps
        self.told_goal = goal
        self._compiled = compiled(self.loss, name="agent.compile") if settings.compile else None
        self._optimizer = GuardedOptimizer(
            [x for x in self.parameters() if x.requires_grad and not any(x is y for y in apart)],
            settings.learning_rate,
            max_grad_norm=settings.max_grad_norm,
            eps=1e-8,
            patience=settings.nonfinite_patience,
        )
        self.policy = PlanningPolicy(
            self,
            action_steps=settings.action_steps or plan_steps,
            goal=goal,
            generator=self._acting,
        )

    @abstractmethod
    def loss(self, batch: Windows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of all losses, and metrics.

        Args:
            batch: Windows ``[B]``; see :class:`~genpol.data.windows.WindowSampler`.
            draws: Of :meth:`draw`.
        """

    def draw(self, rows: int) -> Draws:
        """Draw by name the random numbers that the losses of so many windows need."""
        return {}

    @abstractmethod
    def plan(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Return chunks ``[B, H, A]`` within [-1, 1].

        Args:
            observation: As the networks see it, ``[B, d]``, with the goal behind it where there is
                one.
            noise: Of :meth:`plan_noise`.
        """

    def plan_noise(self, rows: int, generator: torch.Generator) -> Tensor:
        """Draw what plans begin from, ``[rows, H, A]``; for the best of N ``[N, rows, H, A]``."""
        shape = (rows, self.plan_steps, self.specs.action_dim)
        return draw_noise(shape, self.guidance.best_of, generator)

    def act(self, observation: Tensor, generator: torch.Generator) -> Tensor:
        """Return :meth:`plan` for raw observations."""
        return self.plan(self.encode(observation), self.plan_noise(len(observation), generator))

    def encode(self, observation: Tensor) -> Tensor:
        """Standardise raw observations ``[..., d]``; what stands behind them is left as it is."""
        width = self.specs.observation_dim
        if not self.settings.normalize_observations:
            return observation
        state: Tensor = self.normalizer(observation[..., :width])
        return torch.cat((state, observation[..., width:]), dim=-1)

    def value(self, observation: Tensor, chunk: Tensor) -> Tensor:
        """Return what this agent's critics think of chunks.

        Args:
            observation: As the networks see it, ``[B, d]``.
            chunk: ``[..., B, H, A]``.

        Returns:
            Values, or logits that rank alike, ``[..., B]``.

        Raises:
            ConfigError: If it has no critics.
        """
        raise ConfigError(
            "this agent has no critic; take one of iql, fql, qc, dqc, qgf and fisher_decorator"
        )

    def expected_return(self, observation: Tensor, chunk: Tensor) -> Tensor:
        """Return what the critics expect of chunks, in the units of returns, ``[..., B]``.

        The arguments and errors are those of :meth:`value`.
        """
        return self.value(observation, chunk)

    def guide(self, guidance: GuidanceSettings, critic: OfflineAgent | None = None) -> None:
        """Act under this guidance from now on.

        Args:
            guidance: How.
            critic: Whose values guide; by default the agent's own.

        Raises:
            ConfigError: If the policy takes no guidance, or not from that critic.
        """
        if not self.takes_guidance:
            raise ConfigError(
                "guidance: bends the samples of a flow or diffusion model, with which this agent "
                "does not act; bc, qc with policy=best_of, dqc and qgf do"
            )
        if critic is not None:
            raise ConfigError("guidance.critic: is for agent=bc; this agent asks its own critic")
        self.guidance = guidance

    def averages(self) -> Iterable[tuple[nn.Module, nn.Module, float]]:
        """Yield averaged modules, what they follow, and the share that they take in."""
        return ()

    def prepare(self, dataset: OfflineDataset) -> None:
        """Take the statistics of observations from the data, if the settings ask for it."""
        # Weights that were loaded go with the statistics that came with them.
        if self.settings.normalize_observations and self.normalizer.count == 0:
            column, device = dataset.columns["observation"], self.generator.device
            for start in range(0, len(column), 100_000):
                rows = torch.tensor(column[start : start + 100_000], device=device)
                self.normalizer.update(rows)

    def observe(self, rollout: TensorDict) -> int:
        """Take note of what was collected; return the updates that it calls for."""
        steps = rollout.numel() * self.specs.action_repeat
        self._env_steps += steps
        if self._env_steps <= self.settings.online_warmup_steps:
            return 0
        self._updates_owed += rollout.numel() * self.settings.updates_per_step
        updates = int(self._updates_owed)
        self._updates_owed -= updates
        return updates

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Take one step on windows ``[B]``."""
        batch = batch.to(self.generator.device)
        windows = dict(batch.items(include_nested=True, leaves_only=True))
        loss, metrics = (self._compiled or self.loss)(windows, self.draw(len(batch)))
        with torch.no_grad():
            for slow, live, share in self.averages():
                for average, new in zip(slow.parameters(), live.parameters(), strict=True):
                    average.lerp_(new, share)
        metrics |= self._optimizer.step(loss)
        self.gradient_steps += 1
        return metrics | {"loss": loss.detach()}

    def training_state(self) -> dict[str, Any]:
        """Return optimiser, counters, generators, and the plans that are being carried out."""
        return {
            "optimizer": self._optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "gradient_steps": self.gradient_steps,
            "env_steps": self._env_steps,
            "updates_owed": self._updates_owed,
            "acting": self.policy.acting_state(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""
        self._optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.gradient_steps = state["gradient_steps"]
        self._env_steps = state["env_steps"]
        self._updates_owed = state["updates_owed"]
        self.policy.load_acting_state(state["acting"])
