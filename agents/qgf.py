"""Q-guided flow (QGF): a cloned flow, a critic that it never met, and guidance when it acts.

Zhou et al. 2026 (arXiv 2606.11087): a flow of chunks is learned by behaviour cloning and, apart
from it, an IQL critic of chunks (:mod:`genpol.offline.implicit_q`). In acting, every Euler step is
pushed by ``weight`` times the critic's gradient at the one-step estimate of the clean action
(:mod:`genpol.policies.guidance`), and the critic chooses the best of ``best_of`` such samples. The
averaged critics are asked. Nothing is trained anew for another weight: ``genpol eval RUN
guidance.weight=0.08``.

``weight`` carries the units of action^2 / value. The paper's sweep of 0.004 to 0.12 belongs to
OGBench's rewards (minus the number of goals not met) and a discount of 0.999. The derivation by a
KL-regularised optimum is a motivation only: not even for Gaussian data and a linear Q does the
guided flow sample the tilted law.

Deviations: times of the cloning loss are uniform, not on the solver's grid; windows that leave
their trajectory are masked there, too; the flow reads the bare time; both networks have a layer
norm without gain and bias before every activation, and an exact GELU; tasks end at success, as in
OGBench's tasks, not as in the released loader for large files; with ``horizon=1`` it is guidance of
single actions. For two cores: 3 x 256 and a batch of 256 (published: 4 x 1024 and 1024, 500k
updates, a weight chosen for each task).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from genpol.agent import Specs
from genpol.offline import Draws, FlowSettings, NetworkSettings, Windows, make_denoiser
from genpol.offline.behaviour import draw_imitation, imitation_loss, sample_chunks
from genpol.offline.implicit_q import ImplicitQAgent, ImplicitQSettings
from genpol.policies.guidance import GuidanceSettings


def _guidance() -> GuidanceSettings:
    return GuidanceSettings(weight=0.04)


def _network() -> NetworkSettings:
    return NetworkSettings(layer_norm="before")


@dataclass(frozen=True, kw_only=True)
class Settings(FlowSettings, ImplicitQSettings):
    """Hyper-parameters of QGF."""

    horizon: int = 5
    """Actions per chunk H: what is planned at once, and the length of a critic's backup."""
    gamma: float = 0.999
    """Discount per transition."""
    actor: NetworkSettings = field(default_factory=_network)
    """Networks that make actions."""
    critic: NetworkSettings = field(default_factory=_network)
    """Networks that value them."""
    guidance: GuidanceSettings = field(default_factory=_guidance)
    """How the critic bends the flow in acting."""


class QGF(ImplicitQAgent):
    """A flow guided by a critic, offline and then perhaps online.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    settings: Settings

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        super().__init__(settings, specs, device=device, seed=seed)
        self.flow = make_denoiser(specs.observation_dim, specs.action_dim, settings, self.generator)
        self.guidance, self.takes_guidance = settings.guidance, True
        self.begin(plan_steps=settings.horizon)

    def draw(self, rows: int) -> Draws:
        """See :class:`~genpol.offline.OfflineAgent`."""
        return draw_imitation(self.flow, rows, self.specs.action_dim, self.generator)

    def loss(self, batch: Windows, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """See :class:`~genpol.offline.OfflineAgent`."""
        observation = self.encode(batch["observation"])
        after = self.encode(batch["next", "observation"])
        total, metrics = self.values.loss(observation, after, batch)
        imitation, more = imitation_loss(
            self.flow, observation, batch["action"], batch["valid"], draws
        )
        return total + imitation, metrics | more

    @torch.no_grad()
    def plan(self, observation: Tensor, noise: Tensor) -> Tensor:
        """See :class:`~genpol.offline.OfflineAgent`."""
        return sample_chunks(
            self.flow, observation, noise, value=self.value, guidance=self.guidance
        )


AGENT = QGF
