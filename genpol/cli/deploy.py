"""`genpol deploy`: run a bundle's policy on a robot, or on a simulation in real time."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol.errors import ConfigError, nearest

if TYPE_CHECKING:
    from genpol.cli.deploy_simulation import Outcome, Simulation
    from genpol.deploy.bundle import Bundle
    from genpol.deploy.contract import Contract
    from genpol.deploy.controller import Controller, ControllerSettings, Report
    from genpol.deploy.links import Link

SUMMARY = "run a bundle's policy on a robot or a simulation, at a fixed rate"
USAGE = """
usage: genpol deploy <bundle> link=sim [seconds=60] [episodes=N] [record=<file.mcap>]
                     [report=<file.json>] [key=value ...] [--unsafe-no-limits]

Runs the policy in one process and the control loop with its safety filter in another, at the rate
of the contract. Ctrl-C ends the run: the robot is brought to rest first. At the end stands what
happened: latencies, missed deadlines, interventions.

  link=sim               MuJoCo in real time in its own process, as the policy was trained;
                         viewer=true opens a window, seed=20000 chooses the start states
  link=udp:HOST:PORT     a robot that speaks the protocol of genpol.deploy.messages, signed with
                         key=<file>, at least 16 bytes that both sides have
  link=ros2              ros2_control over DDS, without a ROS installation:
                         controller=/forward_position_controller command=array|trajectory
                         states=/joint_states, or observations=/topic for whole vectors; domain=0;
                         peers=ADDRESS,... where there is no multicast
  seconds, episodes      when to end; without them a robot runs until Ctrl-C, a simulation 60 s
  record                 an MCAP file, which Foxglove opens and data= of `genpol train` reads
  minari                 the same as a Minari data set, made at the end; named NAME-v0
  format=onnx            aoti or torchscript, where the bundle has it
  start={joint: command} where joints stand that do not tell
  --unsafe-no-limits     send what is finite as it is; the limits of the contract are on otherwise

  policy_wait=0.5        share of a period in which the policy may answer; 0 never waits, for
                         policies that take longer than a period
  blend_steps=0          actions over which a chunk takes over from the one before
  hold_s=0.2             seconds without an action until the robot is damped
  link_timeout_s=0.5 policy_timeout_s=1   seconds of silence until it is stopped, which lasts until
                         the robot's side resets it
  max_age=2 frozen_s=1 observation_wait=0.25 connect_s=10   see genpol.deploy.controller

examples:
  genpol deploy bundles/HopperStand-gorl link=sim seconds=300
  genpol deploy bundles/arm link=udp:192.168.1.20:9870 key=robot.key record=first-try.mcap
"""

_UNSAFE = "--unsafe-no-limits"
_SIMULATED_S = 60.0
_ROS2 = ("controller", "command", "states", "observations", "domain", "peers")


@dataclass(frozen=True, kw_only=True)
class _Request:
    """What is to be run."""

    bundle: Path
    link: str
    settings: ControllerSettings
    limited: bool = True
    seconds: float = math.inf
    episodes: int = 0
    seed: int = 20_000
    record: Path | None = None
    minari: Path | None = None
    report: Path | None = None
    format: str = "onnx"
    key: Path | None = None
    viewer: bool = False
    start: Mapping[str, float] = field(default_factory=dict)
    ros2: Mapping[str, str] = field(default_factory=dict)


def run(arguments: list[str]) -> int:
    """Run a policy until it is told to end.

    Returns:
        0 if the robot was not stopped, else 1.

    Raises:
        ConfigError: If an argument is wrong, or the bundle does not suit it.
        CheckpointError: If the bundle is damaged.
        LinkError: If the robot does not answer.
        PolicyError: If the policy cannot be started.
    """
    request = _parse(arguments)
    from genpol.deploy.bundle import open_bundle
    from genpol.deploy.observer import Observer
    from genpol.deploy.policy_process import PolicyProcess

    bundle = open_bundle(request.bundle)
    contract = bundle.contract
    if request.report is not None and request.report.exists():
        raise ConfigError(f"report: {request.report}: exists already; give another name")
    _check_start(request.start, contract)
    record = _recording(request)
    if not request.limited:
        sys.stderr.write(
            "genpol: WARNING: --unsafe-no-limits: whatever the policy wants is sent to the robot\n"
        )
    observer = None
    policy = PolicyProcess(bundle.folder, contract, form=_form(request, bundle), seed=request.seed)
    simulation: Simulation | None = None
    try:
        policy.start()
        view = sys.stderr.isatty()
        if record is not None or view:
            observer = Observer(contract, record=record, view=view)
        link, simulation = _open_link(request, contract)
        try:
            report = _control(request, contract, link, policy, observer, simulation)
        finally:
            link.close()
    finally:
        policy.close()
        if observer is not None:
            observer.close()
        outcome = None if simulation is None else simulation.close()
    dropped = 0 if observer is None else observer.dropped
    _tell(report, outcome, request, dropped)
    if observer is not None and observer.failed:
        sys.stderr.write(
            f"genpol: the recording failed ({observer.failed}); it holds what was written before\n"
        )
        return 1
    if request.minari is not None and record is not None:
        from genpol.data import formats

        formats.convert(record, request.minari, "minari")
        sys.stdout.write(f"{record}\n{request.minari}\n")
    return 1 if report.stop_reason else 0


def _check_start(start: Mapping[str, float], contract: Contract) -> None:
    joints = {joint.name: joint for joint in contract.action}
    for name, value in start.items():
        if name not in joints:
            raise ConfigError(
                f"start: no joint {name!r}.{nearest(name, joints)} There are {', '.join(joints)}"
            )
        low, high = joints[name].low, joints[name].high
        if not low <= value <= high:
            raise ConfigError(f"start: {name} = {value!r}: must lie between {low!r} and {high!r}")


def _recording(request: _Request) -> Path | None:
    """Return the file to record, after a look at the names."""
    if request.minari is None:
        return request.record
    from genpol.data import formats

    formats.check_target(request.minari, "minari")
    return request.record or request.minari.with_name(f"{request.minari.name}.mcap")


def _form(request: _Request, bundle: Bundle) -> str:
    from genpol.deploy.bundle import FILES
    from genpol.settings import one_of

    one_of("format", request.format, FILES)
    if request.format not in bundle.formats:
        raise ConfigError(
            f"format = {request.format!r}: {bundle.folder} has {', '.join(bundle.formats)}"
        )
    return request.format


def _open_link(request: _Request, contract: Contract) -> tuple[Link, Simulation | None]:
    from genpol.deploy.links.udp import UdpLink

    kind, _, address = request.link.partition(":")
    link: Link
    simulation = None
    if kind == "sim":
        from genpol.cli.deploy_simulation import Simulation
        from genpol.seeding import derive

        simulation = Simulation(
            contract,
            seed=derive(request.seed, "test"),
            episodes=request.episodes,
            viewer=request.viewer,
        )
        link = UdpLink(simulation.address, simulation.key)
    elif kind == "udp":
        link = UdpLink(address, _read_key(request.key))
    else:
        from genpol.deploy.links.ros2 import Ros2Link

        link = Ros2Link(contract, **_ros2_options(request.ros2))
    if simulation is None and request.limited and _is_loose(contract):
        raise ConfigError(
            f"{request.bundle}: has no limits but those of its simulation, where any command may "
            "follow any other; give your robot's in robot=<file> of genpol export, or add "
            f"{_UNSAFE}"
        )
    link.open()
    return link, simulation


def _control(
    request: _Request,
    contract: Contract,
    link: Link,
    policy: Any,
    observer: Callable[[Any], None] | None,
    simulation: Simulation | None,
) -> Report:
    from functools import partial

    from genpol.deploy.controller import Controller
    from genpol.deploy.safety import SafetyFilter
    from genpol.deploy.start import await_robot, start_commands, take_priority

    reason = take_priority()
    if reason:
        sys.stderr.write(f"genpol: no real-time priority ({reason}); ticks may begin late\n")
    first = await_robot(link, request.settings.connect_s)
    given = dict(request.start)
    if simulation is not None and _is_loose(contract):  # any command may follow any other
        given = {joint.name: joint.neutral for joint in contract.action} | given
    standing = partial(start_commands, contract, given=given)
    start = standing(first)
    safety = SafetyFilter(
        contract.action,
        contract.period_s,
        start,
        hold_s=request.settings.hold_s,
        limited=request.limited,
    )
    controller = Controller(
        *(contract, link, policy, safety, request.settings), standing=standing, look_on=observer
    )
    if simulation is not None:
        simulation.when_done(controller.stop)
    with _ended_by_signals(controller):
        return controller.run(first, request.seconds)


def _is_loose(contract: Contract) -> bool:
    """Whether the limits are those of the simulation, where any command may follow any other."""
    return all(
        (joint.low, joint.high) == (low, high) and high - low <= joint.velocity * contract.period_s
        for joint, (low, high) in zip(contract.action, contract.commands, strict=True)
    )


class _ended_by_signals:  # noqa: N801 - a context manager
    """Lets Ctrl-C, SIGTERM and a lost terminal end a run in order; a second one kills it."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            self._before[number] = signal.signal(number, self._heed)

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _heed(self, *_: object) -> None:
        self._controller.stop()
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _read_key(path: Path | None) -> bytes:
    if path is None:
        raise ConfigError("link=udp: needs key=<file>, which both sides have: openssl rand -hex 16")
    try:
        return path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"key: {path}: cannot be read ({error.strerror})") from None


def _ros2_options(options: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = dict(options)
    if "domain" in found:
        if not found["domain"].isdigit():
            raise ConfigError(f"domain = {found['domain']!r}: must be a whole number")
        found["domain"] = int(found["domain"])
    return found


# --- arguments ----------------------------------------------------------------------------------


def _parse(arguments: Sequence[str]) -> _Request:
    from genpol.deploy.controller import ControllerSettings

    texts = [text for text in arguments if text != _UNSAFE]
    if not texts or "=" in texts[0]:
        raise ConfigError("no bundle given; write: genpol deploy <bundle> link=sim")
    waits = {entry.name: entry.type for entry in fields(ControllerSettings)}
    options: dict[str, Any] = {}
    waiting: dict[str, Any] = {}
    ros2: dict[str, str] = {}
    for text in texts[1:]:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r}: write key=value; see genpol deploy --help")
        if key in waits:
            waiting[key] = _number(key, value, int if waits[key] == "int" else float)
        elif key in _ROS2:
            ros2[key] = value
        elif key in _PARSERS:
            options[key] = _PARSERS[key](key, value)
        else:
            known = [*_PARSERS, *waits, *_ROS2]
            raise ConfigError(f"unknown option {key!r}.{nearest(key, known)}")
    link = options.setdefault("link", "")
    kind = link.partition(":")[0]
    if kind not in ("sim", "udp", "ros2"):
        raise ConfigError(f"link = {link!r}: must be sim, udp:HOST:PORT or ros2")
    for name in ("episodes", "viewer"):
        if name in options and kind != "sim":
            raise ConfigError(f"{name}: only link=sim has it")
    if ros2 and kind != "ros2":
        raise ConfigError(f"{next(iter(ros2))}: only link=ros2 has it")
    if kind == "sim" and not {"seconds", "episodes"} & set(options):
        options["seconds"] = _SIMULATED_S
    return _Request(
        bundle=Path(texts[0]),
        settings=ControllerSettings(**waiting),
        limited=_UNSAFE not in arguments,
        ros2=ros2,
        **options,
    )


def _number(key: str, value: str, kind: Callable[[str], Any]) -> Any:
    try:
        found = kind(value)
    except ValueError:
        raise ConfigError(
            f"{key} = {value!r}: must be a {'whole ' if kind is int else ''}number"
        ) from None
    if not math.isfinite(found) or found < 0:
        raise ConfigError(f"{key} = {value!r}: must be finite and >= 0")
    return found


def _flag(key: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise ConfigError(f"{key} = {value!r}: must be true or false")
    return value.lower() == "true"


def _joints(key: str, value: str) -> dict[str, float]:
    import yaml

    try:
        found = yaml.safe_load(value)
        return {str(name): float(x) for name, x in found.items()}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError):
        raise ConfigError(f"{key} = {value!r}: must be {{joint: command, ...}}") from None


_PARSERS: dict[str, Callable[[str, str], Any]] = {
    "link": lambda _, value: value,
    "format": lambda _, value: value,
    "seconds": lambda key, value: _number(key, value, float),
    "episodes": lambda key, value: _number(key, value, int),
    "seed": lambda key, value: _number(key, value, int),
    "record": lambda _, value: Path(value),
    "minari": lambda _, value: Path(value),
    "report": lambda _, value: Path(value),
    "key": lambda _, value: Path(value),
    "viewer": _flag,
    "start": _joints,
}


# --- report -------------------------------------------------------------------------------------


def _tell(report: Report, outcome: Outcome | None, request: _Request, dropped: int) -> None:
    from genpol.deploy import reporting

    summary = reporting.summary(report)
    if outcome is not None:
        summary["simulation"] = reporting.of_episodes(
            outcome.returns, outcome.lengths, outcome.successes, outcome.periods, outcome.missed
        )
    if dropped:
        summary["ticks_not_recorded"] = dropped
    if request.report is not None:
        request.report.parent.mkdir(parents=True, exist_ok=True)
        request.report.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    reporting.show(summary)
