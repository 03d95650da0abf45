"""The update of agents that learn from windows of data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from genpol.agent import DatasetAgent
from genpol.data.dataset import OfflineDataset
from genpol.errors import ConfigError
from genpol.nn.compiling import compiled
from genpol.nn.optimizer import GuardedOptimizer, half_cosine
from genpol.offline.behaviour import draw_noise
from genpol.offline.chunk_agent import ChunkAgent, Draws, Windows
from genpol.policies.guidance import GuidanceSettings


class OfflineAgent(ChunkAgent, DatasetAgent):
    """Adam on the sum of an agent's losses, and averaged copies of some of its networks.

    Losses that share no parameters are learned as if each had an optimiser of its own, because Adam
    treats every parameter alone. Averages take in the parameters from *before* the step, as the
    released codes of FQL, QC, DQC and QGF do; after the first update they are what they began as.

    What is random is an argument of :meth:`loss` and :meth:`plan`, which are functions of tensors
    and can be compiled.

    A subclass makes its networks and calls :meth:`begin` at the end of its constructor. The
    arguments are those of :class:`~genpol.offline.chunk_agent.ChunkAgent`.

    Attributes:
        guidance: How a critic bends the samples of the policy, where it can.
        takes_guidance: Whether it can: whether the policy's actions are samples of its model.
    """

    guidance = GuidanceSettings()
    takes_guidance = False

    def begin(
        self, *, plan_steps: int, goal: bool = False, apart: Sequence[nn.Parameter] = ()
    ) -> None:
        """Move all networks to their device, and make the optimiser and the policy that acts.

        Args:
            plan_steps: Actions H of a plan.
            goal: Whether the policy is told the environment's goal.
            apart: Parameters that the agent trains in another way.
        """
        self.place(plan_steps=plan_steps, goal=goal)
        settings = self.settings
        self._compiled = compiled(self.loss, name="agent.compile") if settings.compile else None
        self._optimizer = GuardedOptimizer(
            [x for x in self.parameters() if x.requires_grad and not any(x is y for y in apart)],
            settings.learning_rate,
            max_grad_norm=settings.max_grad_norm,
            eps=1e-8,
            patience=settings.nonfinite_patience,
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

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Take one step on windows ``[B]``."""
        windows, settings = self.windows(batch), self.settings
        if settings.decay_updates > 0:
            self._optimizer.learning_rate = half_cosine(
                settings.learning_rate,
                settings.final_learning_rate,
                self.gradient_steps / settings.decay_updates,
            )
        loss, metrics = (self._compiled or self.loss)(windows, self.draw(len(batch)))
        with torch.no_grad():
            for slow, live, share in self.averages():
                for average, new in zip(slow.parameters(), live.parameters(), strict=True):
                    average.lerp_(new, share)
        metrics |= self._optimizer.step(loss)
        self.gradient_steps += 1
        return metrics | {"loss": loss.detach()}

    def training_state(self) -> dict[str, Any]:
        """Return the optimiser's state, and what :class:`ChunkAgent` has."""
        return super().training_state() | {"optimizer": self._optimizer.state_dict()}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""
        super().load_training_state(state)
        self._optimizer.load_state_dict(state["optimizer"])
