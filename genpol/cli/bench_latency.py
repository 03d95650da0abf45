"""What `genpol bench agent=bc` measures: how long a policy takes from an observation to an action.

All contenders are one fresh flow policy, whose weights do not matter to the clock, at one
observation, as a robot's controller asks: the exported graph in ONNX Runtime, as an AOTInductor
package and as TorchScript, the policy itself, and its network in a loop over the steps of
diffusers' ``FlowMatchEulerDiscreteScheduler``, as codes for robots are commonly written. Before the
clock runs, all are seen to make the same chunk of the same noise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol.cli.bench_calls import Suite
from genpol.errors import GenpolError
from genpol.provenance import usable_cores

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from genpol.agents.bc import BC
    from genpol.deploy.tracing import TracedPolicy
    from genpol.report.benchmark import Chunk, Contender
    from genpol.training.settings import TrainSettings

KEYS = ("onnx", "aoti", "torchscript", "eager", "diffusers")
# A 10-step flow of 3 x 256 on the observations and actions of a robot arm.
DEFAULTS = {
    "env": "cube-single-play",
    "num_threads": "1",
    "agent.actor.hidden": "[256,256,256]",
    "agent.solver_steps": "10",
    "agent.horizon": "5",
}
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Question:
    """What all are asked.

    Attributes:
        observation: ``[1, d]``.
        noise: ``[1, H * A]``.
        chunk: What the policy makes of it, ``[1, H, A]``.
    """

    observation: Tensor
    noise: Tensor
    chunk: Tensor


def contenders(settings: TrainSettings) -> list[Contender]:
    """Return all contenders."""
    import torch

    from genpol.cli.building import build
    from genpol.deploy.tracing import NoiseTape, acting, exploration_of, trace
    from genpol.report.benchmark import Contender

    agent, _ = build(settings)
    for parameter in agent.parameters():  # heads that begin at zero would hide errors
        if parameter.requires_grad and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    act = acting(agent, exploration_of(stochastic=False)).act
    traced = trace(agent)
    draw = torch.Generator().manual_seed(0)
    observation = torch.randn(1, traced.observation_dim, generator=draw)
    noise = torch.randn(1, traced.noise_dim, generator=draw)
    with torch.no_grad(), NoiseTape(noise):
        question = Question(observation, noise, act(observation))
    whats = {
        "onnx": "exported graph in ONNX Runtime",
        "aoti": "exported graph, compiled by AOTInductor",
        "torchscript": "exported graph as TorchScript",
    }
    own = {key: partial(_exported, traced, question, key) for key in whats}
    return [
        *(Contender(key=key, what=what, build=own[key]) for key, what in whats.items()),
        Contender(
            key="eager", what="the policy as trained", build=partial(_eager, agent, question)
        ),
        Contender(
            key="diffusers",
            what="its network in a loop over diffusers' scheduler",
            build=partial(_diffusers, agent, question),
        ),
    ]


def _exported(traced: TracedPolicy, question: Question, form: str, cleanup: ExitStack) -> Chunk:
    from genpol.deploy import export
    from genpol.report.benchmark import SkippedError

    folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
    inputs = {"observation": question.observation, "noise": question.noise}
    try:
        plan = export.single(traced, inputs, folder, form)
    except GenpolError as error:
        raise SkippedError(str(error)) from None
    given = {name: x.numpy() for name, x in inputs.items()}
    return _checked(lambda: plan(given), question)


def _eager(agent: BC, question: Question, cleanup: ExitStack) -> Chunk:
    import torch

    def plan() -> Any:
        with torch.no_grad():
            noise = question.noise.view(1, agent.plan_steps, -1)
            own = agent.plan(agent.encode(question.observation), noise)
            return (agent.action_shift + agent.action_scale * own).clamp(-1.0, 1.0).numpy()

    return _checked(plan, question)


def _diffusers(agent: BC, question: Question, cleanup: ExitStack) -> Chunk:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler

    flow = agent.flow
    steps = agent.settings.solver_steps
    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1)
    # Their time runs from noise at 1 to data at 0, and their velocity the same way.
    sigmas = [1.0 - step / steps for step in range(steps)]

    def plan() -> Any:
        with torch.no_grad():
            observation = agent.encode(question.observation)
            sample = question.noise.view(1, *flow.action_shape)
            scheduler.set_timesteps(sigmas=sigmas)
            for time in scheduler.timesteps:
                velocity = flow.velocity(observation, sample, (1.0 - time).view(1, 1))
                sample = scheduler.step(-velocity, time, sample, return_dict=False)[0]
            return sample.clamp(-1.0, 1.0).numpy()

    return _checked(plan, question)


def _checked(plan: Callable[[], np.ndarray], question: Question) -> Chunk:
    import numpy as np

    from genpol.report.benchmark import SkippedError

    error = float(np.abs(plan().reshape(question.chunk.shape) - question.chunk.numpy()).max())
    if not error <= _TOLERANCE:
        raise SkippedError(f"makes another chunk of the same noise (difference {error:.2g})")

    def chunk() -> int:
        plan()
        return 1

    return chunk


def _title(settings: TrainSettings) -> str:
    agent: Any = settings.agent
    return (
        f"one observation to a chunk of {agent.horizon} actions, network "
        f"{'-'.join(map(str, agent.actor.hidden))}, {agent.solver_steps} flow steps, "
        f"{settings.num_threads or usable_cores()} threads"
    )


SUITE = Suite(
    name="bench-latency", keys=KEYS, contenders=contenders, title=_title, defaults=DEFAULTS
)
