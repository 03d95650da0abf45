"""`genpol export`: write a trained policy as a bundle for a robot controller."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol.errors import ConfigError, nearest

if TYPE_CHECKING:
    from torch import Tensor

    from genpol.cli.runs import TrainedRun
    from genpol.deploy.contract import Contract
    from genpol.deploy.tracing import TracedPolicy

SUMMARY = "write a trained policy as a bundle for a robot controller"
USAGE = """
usage: genpol export <run folder, checkpoint or policy folder> [output=<folder>] [formats=onnx]
                     [robot=<file.yaml>] [stochastic=false] [real_time_chunking=false]
                     [guidance.KEY=VALUE ...] [corrector=cdsa:<run>] [key=value ...]

Writes the policy with normaliser, all solver steps, guidance and correction inside, and
contract.json, which tells names, order, units, limits and rate of what goes in and out. Every
format is compared with the trained policy on observations of a rollout; one that differs by more
than 1e-5 is not written. `genpol deploy <bundle>` runs it.

  output              the folder to make (bundles/<env>-<agent>)
  formats             several with commas: onnx (for genpol deploy), aoti (a package for C++, by
                      AOTInductor), torchscript
  robot               what your robot calls things and what it may be told, see below; without it
                      commands may be all that the simulation took, at any speed
  stochastic          sample where the policy has a mode
  real_time_chunking  let chunks of a flow go on from those that are being carried out, for
                      policies that take longer than a period (arXiv 2506.07339)
  guidance.*, corrector, corrector.*   as in `genpol eval`, with one weight
  key=value           other settings of the run; a policy folder needs env=<name>

robot.yaml, all of it optional:
  observation:                 # names and units in the policy's order
    - {name: waist.position, unit: rad}
  joints:                      # by the names of the actions, see contract.json
    waist: {low: -0.8, high: 0.8, velocity: 3, acceleration: 40, jerk: 2000,
            interface: effort, unit: N m, neutral: 0, name: waist_motor}

examples:
  genpol export runs/HopperStand/gorl/20261122-101500-s0
  genpol export RUN output=bundles/arm robot=arm.yaml formats=onnx,aoti
  genpol export RUN guidance.weight=0.04 guidance.best_of=4
"""

_ROBOT = ("observation", "joints")


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What is to be written."""

    path: Path
    output: Path | None = None
    formats: tuple[str, ...] = ("onnx",)
    robot: Mapping[str, Any]
    stochastic: bool = False
    real_time_chunking: bool = False
    guided: Mapping[str, str]
    corrected: Mapping[str, str]
    corrector: str | None = None
    overrides: tuple[str, ...] = ()


def run(arguments: list[str]) -> int:
    """Write a bundle.

    Raises:
        ConfigError: If an argument is wrong, or the policy cannot be a graph.
        CheckpointError: If the run has no sound checkpoint.
        ExportError: If a format cannot hold the policy, or does not do as the trained one.
        DatasetError: If the bundle exists or cannot be written.
        MissingExtraError: If what writes a format is not installed.
    """
    request = _parse(arguments)
    from genpol.cli import correction, guidance

    guided = guidance.parse(request.guided)
    corrected = correction.parse(request.corrector, request.corrected)
    if guided is not None and len(guided.weights) > 1:
        raise ConfigError("guidance.weight: one weight is exported; genpol eval compares several")
    from genpol.cli.runs import load_run
    from genpol.data.staging import refuse_existing
    from genpol.deploy import export
    from genpol.deploy.tracing import acting, exploration_of, trace
    from genpol.envs import label

    trained = load_run(request.path, [*request.overrides, "device=cpu"])
    agent = trained.agent
    choices = trained.settings.choices
    target = request.output or Path("bundles") / f"{label(trained.settings.env)}-{choices.agent}"
    refuse_existing(target)
    if guided is not None:
        critic = None if guided.critic is None else load_run(guided.critic, ["device=cpu"]).agent
        guidance.guide(agent, guided, next(iter(guided.weights), None), critic)
    if corrected is not None:
        correction.apply(trained, corrected, seed=0, deterministic=not request.stochastic)
    bound = {"real_time_chunking": request.real_time_chunking}
    traced = trace(agent, stochastic=request.stochastic, **bound)
    contract = _with_robot(_contract(trained, traced, request), request.robot)
    act = acting(agent, exploration_of(request.stochastic), **bound).act
    observations = _observations(trained, export.NUM_EXAMPLES)
    bundle = export.write(target, traced, act, contract, observations, formats=request.formats)
    worst = ", ".join(f"{form} {error:.1g}" for form, error in bundle.contract.parity.items())
    sys.stdout.write(
        f"{target}: {choices.agent} for {contract.env}, {1 / contract.period_s:g} Hz, "
        f"{contract.action_steps} of {contract.horizon} actions a chunk\n"
        f"greatest difference from the trained policy: {worst}\n"
        f"try it: genpol deploy {target} link=sim\n"
    )
    return 0


def _parse(arguments: Sequence[str]) -> _Request:
    if not arguments or "=" in arguments[0]:
        raise ConfigError("no run given; write: genpol export <run folder>")
    options: dict[str, Any] = {}
    apart: dict[str, dict[str, str]] = {"guidance": {}, "corrector": {}}
    overrides: list[str] = []
    for text in arguments[1:]:
        key, equals, value = text.partition("=")
        group, dot, name = key.partition(".")
        if equals and dot and group in apart:
            apart[group][name] = value
        elif key in ("stochastic", "real_time_chunking") and equals:
            if value.lower() not in ("true", "false"):
                raise ConfigError(f"{key} = {value!r}: must be true or false")
            options[key] = value.lower() == "true"
        elif key == "output" and equals:
            options[key] = Path(value)
        elif key == "formats" and equals:
            options[key] = tuple(value.strip("[]").split(","))
        elif key == "robot" and equals:
            options[key] = _read_robot(Path(value))
        elif key == "corrector" and equals:
            options[key] = value
        else:
            overrides.append(text)
    options.setdefault("robot", {})
    from genpol.deploy.bundle import FILES
    from genpol.settings import one_of

    for form in options.get("formats", ()):
        one_of("formats", form, FILES)
    return _Request(
        path=Path(arguments[0]),
        guided=apart["guidance"],
        corrected=apart["corrector"],
        overrides=tuple(overrides),
        **options,
    )


def _read_robot(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"robot: {path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"robot: {path}: is no YAML ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"robot: {path}: must have the entries observation or joints")
    for name in found:
        if name not in _ROBOT:
            raise ConfigError(f"robot: {path}: unknown entry {name!r}.{nearest(name, _ROBOT)}")
    return found


def _contract(trained: TrainedRun, traced: TracedPolicy, request: _Request) -> Contract:
    """Return the contract of a policy in its own simulation."""
    from dataclasses import asdict

    from genpol.deploy.contract import Channel, Contract, loosest
    from genpol.envs import family, label, make, signals

    settings = trained.settings
    env = make(settings.env, num_envs=1, seed=0)
    period_s = float(env.control_period_s)
    seen = [Channel(name=name, unit=unit) for name, unit in signals.observation(env)]
    driven = signals.actions(env)
    env.close()
    goals = trained.agent.specs.goal_dim if getattr(trained.agent, "told_goal", False) else 0
    seen += [Channel(name=f"goal[{index}]") for index in range(goals)]
    return Contract(
        env=label(settings.env),
        agent=settings.choices.agent,
        observation=tuple(seen),
        observation_steps=settings.env.observation_steps,
        goal_dim=goals,
        action=tuple(
            loosest(x.name, x.low, x.high, period_s, unit=x.unit, interface=x.interface)
            for x in driven
        ),
        commands=tuple((x.low, x.high) for x in driven),
        period_s=period_s,
        horizon=traced.horizon,
        action_steps=traced.action_steps,
        inputs=traced.inputs,
        memory=traced.memory,
        sampling="sample" if request.stochastic else "mode",
        solver_steps=getattr(settings.agent, "solver_steps", 0),
        source={
            "checkpoint": "/".join(trained.checkpoint.parts[-3:]),
            "seed": settings.seed,
            "simulator": family(settings.env),
            "simulation": asdict(settings.env),
        },
    )


def _with_robot(contract: Contract, robot: Mapping[str, Any]) -> Contract:
    """Return the contract with a robot's own names, units and limits."""
    from dataclasses import replace

    from genpol.deploy.contract import Channel

    entries = robot.get("observation")
    if entries is not None:
        wanted = len(contract.observation)
        if not isinstance(entries, list) or len(entries) != wanted:
            count = len(entries) if isinstance(entries, list) else "no list of"
            raise ConfigError(f"robot: observation has {count} entries, the policy sees {wanted}")
        try:
            channels = tuple(Channel(**entry) for entry in entries)
        except TypeError as error:
            raise ConfigError(
                f"robot: observation: {error}; entries are {{name: ..., unit: ..., low: ..., "
                "high: ...}"
            ) from None
        contract = replace(contract, observation=channels)
    joints = robot.get("joints") or {}
    if not isinstance(joints, dict) or not all(isinstance(x, dict) for x in joints.values()):
        raise ConfigError("robot: joints: must be {name of the action: {limit: value}}")
    return contract.with_limits(joints)


def _observations(trained: TrainedRun, count: int) -> Tensor:
    """Return what the policy sees in acting, ``[count, d]``, spread over an episode."""
    import torch
    from torchrl.envs import ExplorationType, set_exploration_type

    agent = trained.agent
    env = trained.make_env(num_envs=1, seed=0)
    seen = []
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        step = env.reset()
        for _ in range(8 * count):
            observation = step["observation"]
            if getattr(agent, "told_goal", False):
                observation = torch.cat((observation, step["goal"]), dim=-1)
            seen.append(observation)
            step = env.maybe_reset(env.step_mdp(env.step(agent.policy(step))))
    env.close()
    places = torch.linspace(0, len(seen) - 1, count).long()
    return torch.cat([seen[place] for place in places.tolist()])
