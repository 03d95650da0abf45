"""What `genpol bench agent=mbdpo` measures: how long planning takes, by the size of the search.

All contenders plan in fresh models of the same widths, whose weights do not matter to the clock,
and begin from what is left of their last plans, as in acting: reverse diffusion with N candidates
and T noise levels (``diffusion-NxT``), MPPI with N candidates and R rounds (``mppi-NxR``), and the
score network that has learned the search (``score``), which imagines nothing. Each is there as it
is and compiled; before the clock runs, what is compiled is seen to find the same action.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any

from genpol.cli.bench_calls import Suite
from genpol.errors import ConfigError
from genpol.provenance import usable_cores

if TYPE_CHECKING:
    import torch
    from tensordict import TensorDict

    from genpol.agent import Specs
    from genpol.report.benchmark import Chunk, Contender
    from genpol.training.settings import TrainSettings
    from genpol.world_model import WorldModelAgent

DEFAULTS = {"env": "CheetahRun", "num_envs": "1", "num_threads": "1", "env.num_threads": "1"}
# Elites and candidates of the policy come with the number of candidates.
_BY_PLANS: dict[int, Mapping[str, int]] = {
    64: {"num_plans": 64, "num_elites": 16, "num_policy_plans": 4},
    128: {"num_plans": 128, "num_elites": 16, "num_policy_plans": 6},
    512: {"num_plans": 512, "num_elites": 64, "num_policy_plans": 24},
}
_DIFFUSION = ((64, 5), (128, 10), (512, 20))
_MPPI = ((64, 6), (512, 6))
_SCORE = "score"
_SIZES: dict[str, tuple[str, Mapping[str, Any]]] = {
    **{
        f"diffusion-{plans}x{steps}": ("mbdpo", {**_BY_PLANS[plans], "diffusion_steps": steps})
        for plans, steps in _DIFFUSION
    },
    _SCORE: ("mbdpo", {"score_network": True, "act": "score"}),
    **{
        f"mppi-{plans}x{rounds}": ("tdmpc2", {**_BY_PLANS[plans], "iterations": rounds})
        for plans, rounds in _MPPI
    },
}
_FORMS = ("", "-compiled")
KEYS = tuple(f"{size}{form}" for size in _SIZES for form in _FORMS)
# Where rounding makes another candidate the last of the best, plans part by a little.
_TOLERANCE = 0.02


def contenders(settings: TrainSettings) -> list[Contender]:
    """Return all contenders."""
    from genpol.agent import Specs
    from genpol.envs import make
    from genpol.report.benchmark import Contender

    env = make(settings.env, num_envs=settings.num_envs, device=settings.device, seed=0)
    specs = Specs.from_env(env, num_envs=settings.num_envs)
    seen = env.reset()
    env.close()
    return [
        Contender(
            key=f"{size}{form}",
            what=_what(size) + form.replace("-", ", "),
            build=partial(_searching, settings, specs, seen, size, form),
        )
        for size in _SIZES
        for form in _FORMS
    ]


def _what(size: str) -> str:
    kind, _, numbers = size.partition("-")
    plans, _, steps = numbers.partition("x")
    if kind == _SCORE:
        return "score network, no imagination"
    return f"{plans} candidates, " + (
        f"{steps} noise levels" if kind == "diffusion" else f"{steps} rounds of MPPI"
    )


def _searching(
    settings: TrainSettings,
    specs: Specs,
    seen: TensorDict,
    size: str,
    form: str,
    cleanup: ExitStack,
) -> Chunk:
    from torchrl.envs import ExplorationType, set_exploration_type

    from genpol.report.benchmark import SkippedError

    agent = _agent(settings, specs, size, compiled=bool(form))
    observed = seen.select("observation", "is_init").clone()

    def act() -> torch.Tensor:
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            action: torch.Tensor = agent.policy(observed)["action"]
        return action.cpu()  # which waits for the device

    if form:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            first = act()
        refused = [str(x.message) for x in told if "cannot compile" in str(x.message)]
        if refused:
            raise SkippedError(refused[0])
        plain = _agent(settings, specs, size, compiled=False)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            expected = plain.policy(observed.clone())["action"].cpu()
        error = float((first - expected).abs().max())
        if not error <= _TOLERANCE:
            raise SkippedError(f"finds another action (difference {error:.2g})")
    observed["is_init"].zero_()

    def chunk() -> int:
        act()
        return 1

    for _ in range(3):
        chunk()
    return chunk


def _agent(settings: TrainSettings, specs: Specs, size: str, *, compiled: bool) -> WorldModelAgent:
    """Return a fresh agent with a search of that size, the same every time."""
    import torch

    from genpol.agents import make, settings_class
    from genpol.world_model import WorldModelAgent, WorldModelSettings

    name, search = _SIZES[size]
    if not isinstance(settings.agent, WorldModelSettings):
        raise ConfigError(f"agent={settings.choices.agent}: must be mbdpo or tdmpc2")
    shared = {x.name: getattr(settings.agent, x.name) for x in fields(WorldModelSettings)}
    own = settings_class(name)(**{**shared, **search, "compile": compiled, "warmup_steps": 0})
    agent = make(name, own, specs, device=settings.device, seed=0)
    assert isinstance(agent, WorldModelAgent)
    draw = torch.Generator(settings.device).manual_seed(0)
    for parameter in agent.parameters():  # heads that begin at zero would hide errors
        if parameter.requires_grad and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5, generator=draw)
    return agent


def _title(settings: TrainSettings) -> str:
    widths = settings.agent.widths
    return (
        f"{settings.choices.env}, {settings.num_envs} environments, one action each; latent state "
        f"{widths.latent_dim}, hidden layers {widths.mlp_dim}, horizon {settings.agent.horizon}, "
        f"{settings.device}, {settings.num_threads or usable_cores()} threads"
    )


SUITE = Suite(
    name="bench-search", keys=KEYS, contenders=contenders, title=_title, defaults=DEFAULTS
)
