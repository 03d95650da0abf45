"""One episode of Meta-World's scripted experts, with or without noise.

Each task of Meta-World comes with an expert (Yu et al., arXiv 1910.10897), a function of the
observation. How noise disturbs it is told in ``genpol.envs.demonstrations``. The environment is
that of ``genpol.envs.metaworld``, so that rewards, ends and success are those that an agent would
meet there: with sparse rewards an episode ends when the task is solved.

An episode is a function of the recipe's seed and its own number alone: whoever makes it, and after
whatever others, it is the same to the bit with the same versions of Meta-World, MuJoCo and NumPy.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from genpol.data.dataset import OfflineDataset
from genpol.envs.demonstrations import NoisyRecipe, play
from genpol.envs.metaworld import Task, package
from genpol.envs.settings import METAWORLD_REWARDS, MetaWorldSettings, label
from genpol.errors import DatasetError
from genpol.seeding import derive


@dataclass(frozen=True, kw_only=True)
class Recipe(NoisyRecipe):
    """What determines the episodes of a data set."""

    packages: ClassVar[tuple[str, ...]] = ("metaworld",)

    settings: MetaWorldSettings
    """Task and reward."""

    @property
    def name(self) -> str:
        """The environment's name: peg-insert-side-v3, or peg-insert-side-v3-dense."""
        return label(self.settings)

    @property
    def dataset_name(self) -> str:
        """A name for such a set: peg-insert-side-v3-expert, peg-insert-side-v3-noise0.5."""
        return f"{self.name}-{f'noise{self.noise:g}' if self.noise else 'expert'}"

    def provenance(self) -> dict[str, Any]:
        """Return all that the data depend on, as JSON can say it.

        Raises:
            MissingExtraError: If Meta-World is not installed.
        """
        package()
        return {**super().provenance(), "reward": self.settings.reward}

    def demonstrator(self) -> Demonstrator:
        """Return the environment with its expert."""
        return Demonstrator(self)


class Demonstrator:
    """An environment with the expert that plays in it.

    Args:
        recipe: What is played.

    Raises:
        MissingExtraError: If Meta-World is not installed.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._task = Task(recipe.settings)
        self._expert: Any = package("metaworld.policies").ENV_POLICY_MAP[recipe.settings.name]()

    def episode(self, split: str, index: int) -> dict[str, np.ndarray]:
        """Play one episode.

        Args:
            split: ``"train"`` or ``"val"``, which share no episode.
            index: Number of the episode within its split.

        Returns:
            The columns of :func:`~genpol.envs.demonstrations.play`.
        """
        seeds = np.random.SeedSequence((derive(self.recipe.seed, f"metaworld-{split}"), index))
        world, own = seeds.spawn(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of experts whose actions are cut to [-1, 1]
            return play(
                self._task,
                lambda: self._act,
                noise=self.recipe.noise,
                rng=np.random.default_rng(own),
                seed=int(world.generate_state(1, np.uint64)[0]),
            )

    def _act(self, observation: np.ndarray) -> np.ndarray:
        action: np.ndarray = self._expert.get_action(observation.astype(np.float64))
        return action


def check_rewards(dataset: OfflineDataset, settings: MetaWorldSettings) -> None:
    """Refuse data of the same task with the other reward.

    Raises:
        DatasetError: If the data say that they are such.
    """
    (other,) = set(METAWORLD_REWARDS) - {settings.reward}
    if dataset.metadata.get("env") == label(replace(settings, reward=other)):
        raise DatasetError(
            f"column reward holds {other} rewards, those of env.reward={other}, and not the "
            f"{settings.reward} ones of the environment; set env.reward={other}, or make the data "
            f"set anew with {settings.reward} ones"
        )
