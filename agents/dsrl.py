"""Diffusion steering (DSRL): a small policy chooses the noise from which a frozen one begins.

Wagenmaker et al. 2025 (arXiv 2506.15799), with noise aliasing (their variant NA). The pretrained
policy, solved without noise in its steps, is a map ``a = F(s, w)`` from latent noise to chunks, and
the small policy a soft actor over w, bounded by ``bound``. Critics ``Q(s, a)`` of real chunks are
learned from all that was done; a second ensemble ``Q_w(s, w)`` follows ``Q(s, F(s, w))`` at w from
N(0, I), so that no gradient goes through F, and the small policy climbs ``Q_w``.

In the warm-up the latent noise is N(0, I), clipped to the bound: the pretrained policy itself.

Deviations: ten critics whose target is the least of two at random (the recipe has two), and the
mean of ``Q_w`` for the small policy. Their recipe holds an entropy of 0, makes 20 updates for every
chunk and has widths of 2048; here widths are those of the other agents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from genpol import settings as check
from genpol.agent import Specs
from genpol.finetuning import FinetuningAgent
from genpol.finetuning.agent import Parts
from genpol.finetuning.soft_actor import SoftActor, SoftSettings
from genpol.objectives.value_learning import critic_loss
from genpol.offline.behaviour import draw_noise, sample_chunks
from genpol.offline.chunk_agent import Windows


@dataclass(frozen=True, kw_only=True)
class Settings(SoftSettings):
    """Hyper-parameters of DSRL."""

    bound: float = 1.5
    """Bound on the absolute latent noise that is chosen."""
    num_noise_critics: int = 2
    """Size of the ensemble that values latent noise."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.positive("agent.bound", self.bound)
        check.at_least("agent.num_noise_critics", self.num_noise_critics, 1)


class DSRL(FinetuningAgent):
    """A frozen policy, steered through its noise.

    Attributes:
        steering: The small policy.
        noise_critic: Values of latent noise.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    settings: Settings

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        super().__init__(settings, specs, device=device, seed=seed)
        self.actor.requires_grad_(False)
        width = settings.horizon * specs.action_dim
        self.steering = SoftActor(specs.observation_dim, width, settings, self.generator)
        self.noise_critic = self.make_critic(settings.num_noise_critics)
        self.begin()

    def parts(self) -> Parts:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        settings = self.settings
        noise_critic = [*self.noise_critic.parameters()]
        return (
            super().parts()
            | self.steering.parts()
            | {"noise_critic": (noise_critic, settings.critic_learning_rate)}
        )

    def choose(self, observation: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        if explore and self.warming_up:
            bound = self.settings.bound
            return self.steer(
                observation, self._chance(len(observation), generator).clamp(-bound, bound)
            )
        if not explore:
            return self.steer(observation, self._latent(self.steering.policy.mode(observation)))
        drawn = self.steering.draw(observation, generator)
        return self.steer(observation, self._latent(drawn.action))

    def steer(self, observation: Tensor, latent: Tensor) -> Tensor:
        """Return the frozen policy's chunks for latent noise, ``[B, H, A]`` both."""
        return sample_chunks(self.actor, observation, latent)

    def next_chunks(self, observation: Tensor) -> Tensor:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        samples = range(self.settings.target_samples)
        drawn = [self.steering.draw(observation, self.generator).action for _ in samples]
        return torch.stack([self.steer(observation, self._latent(x)) for x in drawn])

    def update_policy(self, batch: Windows, successful: Windows) -> dict[str, Tensor]:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        observation = self.encode(batch["observation"])
        metrics = self._update_noise_critic(observation)

        def value(output: Tensor) -> Tensor:
            found: Tensor = self.noise_critic(observation, self._latent(output), frozen=True)
            return found.mean(0)

        return metrics | self.steering.step(observation, value, self._optimizers, self.generator)

    def _update_noise_critic(self, observation: Tensor) -> dict[str, Tensor]:
        latent = self._chance(len(observation), self.generator)
        with torch.no_grad():
            target = self.critic(observation, self.steer(observation, latent)).mean(0)
        loss = critic_loss(self.noise_critic(observation, latent), target)
        self._optimizers["noise_critic"].step(loss)
        return {"loss/noise_critic": loss.detach()}

    def _chance(self, rows: int, generator: torch.Generator) -> Tensor:
        return draw_noise((rows, self.settings.horizon, self.specs.action_dim), 1, generator)

    def _latent(self, output: Tensor) -> Tensor:
        """Return the latent noise ``[B, H, A]`` that outputs ``[B, H A]`` in [-1, 1] stand for."""
        return self.settings.bound * output.unflatten(-1, (self.settings.horizon, -1))


AGENT = DSRL
