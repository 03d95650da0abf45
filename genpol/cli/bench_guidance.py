"""What `genpol bench agent=qgf` measures: what guidance costs when it acts, beside best of N.

All contenders are the same flow and critic, fresh ones, whose weights do not matter to the clock. A
plan is a chunk of actions for one observation; `num_envs` observations are planned for together: 1
is a robot's controller, 50 an evaluation.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from genpol.report.benchmark import Chunk, Contender
    from genpol.training.settings import TrainSettings

BASELINE = "flow"
_GUIDANCE: dict[str, tuple[str, dict[str, Any]]] = {
    BASELINE: ("a sample of the flow", {"weight": 0.0}),
    "qgf": ("guided, gradient at the one-step estimate", {"weight": 0.04}),
    "noisy": ("guided, gradient at the noisy action", {"weight": 0.04, "estimator": "noisy"}),
    "jacobian": ("guided, through the network", {"weight": 0.04, "estimator": "jacobian"}),
    "rollout": ("guided, gradient at the end", {"weight": 0.04, "estimator": "rollout"}),
    "bptt": ("guided, through all steps left", {"weight": 0.04, "estimator": "bptt"}),
    "best-of-4": ("the best of 4 samples", {"weight": 0.0, "best_of": 4}),
    "best-of-32": ("the best of 32 samples", {"weight": 0.0, "best_of": 32}),
    "qgf-best-of-4": ("the best of 4 guided samples", {"weight": 0.04, "best_of": 4}),
}
KEYS = tuple(_GUIDANCE)
# (first, second, name, wanted)
RATIOS = (
    ("qgf", "best-of-4", "guided / best of 4", ""),
    ("qgf", "best-of-32", "guided / best of 32", ""),
    ("bptt", "qgf", "through all steps / one-step estimate", ""),
)
DEFAULTS = {"env": "cube-single-play", "num_envs": "1"}


def title(settings: TrainSettings) -> str:
    """Return the sizes in words."""
    agent = settings.agent
    return (
        f"chunks of {agent.horizon}, flow and critics of {'-'.join(map(str, agent.actor.hidden))}, "
        f"{agent.solver_steps} flow steps; plans/s"
    )


def contenders(settings: TrainSettings) -> list[Contender]:
    """Return all contenders."""
    from genpol.cli.building import build
    from genpol.report.benchmark import Contender

    agent, _ = build(settings)
    return [
        Contender(key=key, what=what, build=partial(_plan, agent, settings.num_envs, options))
        for key, (what, options) in _GUIDANCE.items()
    ]


def _plan(agent: Any, rows: int, options: dict[str, Any], cleanup: ExitStack) -> Chunk:
    import torch

    from genpol.policies.guidance import GuidanceSettings

    generator = torch.Generator(agent.generator.device).manual_seed(0)
    shape = (rows, agent.specs.observation_dim)
    observation = torch.randn(shape, generator=generator, device=generator.device)
    guidance = GuidanceSettings(**options)

    def chunk() -> int:
        agent.guide(guidance)
        agent.act(observation, generator)
        return rows

    chunk()
    return chunk
