"""Before the control loop: the robot's first observation, where its joints stand, the process."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from genpol.deploy.contract import Contract
from genpol.deploy.links.base import Link, Observed
from genpol.errors import ConfigError, GenpolError

LOOP_PRIORITY, POLICY_PRIORITY = 20, 10
"""Real-time priorities of the control loop, and below it of the policy."""


class LinkError(GenpolError):
    """The robot does not answer."""


def await_robot(link: Link, timeout_s: float) -> Observed:
    """Return the first observation.

    Raises:
        LinkError: If none comes in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left = deadline - time.monotonic()
        observed = link.read(min(0.1, max(0.0, left)))
        if observed is not None:
            return observed
        if left <= 0.0:
            raise LinkError(
                f"link: no observation within {timeout_s:g} s; see that the robot's side runs, and "
                "that address, key and names are the same on both sides"
            )


def take_priority(priority: int = LOOP_PRIORITY) -> str:
    """Have this process run before others that want its core; return why that was not to be had."""
    if not hasattr(os, "sched_setscheduler"):
        return "this system has no real-time scheduling"
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except OSError as error:
        return f"{error.strerror}; see `ulimit -r` and CAP_SYS_NICE"
    return ""


def start_commands(
    contract: Contract, first: Observed, given: Mapping[str, float] = MappingProxyType({})
) -> list[float]:
    """Return the commands that a robot is at when it begins.

    Joints that are told positions begin where they stand, others at what does nothing.

    Args:
        contract: What is observed and commanded.
        first: An observation.
        given: Commands of joints that do not tell where they stand.

    Raises:
        ConfigError: If it is not observed where a joint stands, in its own unit, or it stands
            beyond its limits.
    """
    places = {channel.name: index for index, channel in enumerate(contract.observation)}
    found = []
    for joint in contract.action:
        if joint.name in given:
            found.append(given[joint.name])
            continue
        if joint.interface != "position":
            found.append(joint.neutral)
            continue
        place = places.get(f"{joint.name}.position")
        value = math.nan if place is None or place >= len(first.values) else first.values[place]
        if not math.isfinite(value):
            raise ConfigError(
                f"joint {joint.name!r}: is told positions, but the robot does not tell where it "
                f"stands; name an observation {joint.name}.position in robot=<file> of genpol "
                "export, or give start={joint: command, ...}"
            )
        assert place is not None
        unit = contract.observation[place].unit
        if unit not in ("1", joint.unit):  # 1 where nobody has said
            raise ConfigError(
                f"joint {joint.name!r}: is told {joint.unit}, and {joint.name}.position is in "
                f"{unit}; give both in one unit in robot=<file> of genpol export"
            )
        if not joint.low <= value <= joint.high:
            raise ConfigError(
                f"joint {joint.name!r}: stands at {value:g} {unit}, beyond its limits "
                f"[{joint.low:g}, {joint.high:g}]; move it within them first"
            )
        found.append(value)
    return found


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the garbage collector from pausing the loop."""
    enabled = gc.isenabled()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()
