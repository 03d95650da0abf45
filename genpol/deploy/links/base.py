"""What the controller knows of a robot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from genpol.deploy.safety import Command


class Observed(NamedTuple):
    """An observation.

    Attributes:
        values: Its numbers, in the order and the units of the contract.
        measured_s: When it was measured, on this process's monotonic clock.
        first: Whether an episode begins with it; robots have no episodes.
    """

    values: tuple[float, ...]
    measured_s: float
    first: bool = False


class Link(ABC):
    """A connection to a robot, used from one thread.

    A link says nothing of what it does not know: a silent robot is one from which :meth:`read`
    returns ``None``, and what comes of that is the controller's to decide. A link keeps why the
    robot's side wants a stop in ``_stop``, and in ``_reset`` that it asked to go on.
    """

    _stop = ""
    _reset = False

    @abstractmethod
    def open(self) -> None:
        """Connect.

        Raises:
            ConfigError: If an address is wrong or taken.
        """

    @abstractmethod
    def read(self, timeout_s: float) -> Observed | None:
        """Return the newest observation that was not returned before; ``None`` if none comes.

        Args:
            timeout_s: How long to wait if there is none yet.
        """

    @abstractmethod
    def write(self, command: Command) -> None:
        """Send a command, without waiting."""

    @property
    def stop_requested(self) -> str:
        """Why the robot's side wants a stop; empty if it does not."""
        return self._stop

    def take_reset(self) -> bool:
        """Return whether the robot's side asked to go on after a stop since this was last asked."""
        asked, self._reset = self._reset, False
        return asked

    def statistics(self) -> dict[str, int]:
        """Return counts of what was lost or dropped."""
        return {}

    @abstractmethod
    def close(self) -> None:
        """Disconnect."""
