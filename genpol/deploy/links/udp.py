"""Robots that speak :mod:`genpol.deploy.messages` over UDP.

The robot's side listens; the controller greets it until it answers. Whoever holds the key may
command, one at a time: another is heard when the one before has been silent for a second.
"""

from __future__ import annotations

import math
import select
import socket
import time
from collections.abc import Sequence

from genpol.deploy.links.ages import Ages
from genpol.deploy.links.base import Link, Observed
from genpol.deploy.messages import Endpoint, Kind, Message
from genpol.deploy.safety import Command, Mode
from genpol.errors import ConfigError

_LONGEST = 65_535
_GREETING_S = 0.1
_TAKEOVER_S = 1.0
_FIRST, _STOPPING = 1, 2  # in the mode of an observation
_ASKED = "the robot's side asked for it"
_MODES = list(Mode)


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of ``host:port``.

    Raises:
        ConfigError: If it is written otherwise.
    """
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdigit() and int(port) <= _LONGEST):
        raise ConfigError(f"link: address {text!r}: write host:port, such as 127.0.0.1:9870")
    return host, int(port)


class _Socket:
    """An endpoint of the protocol on a socket."""

    def __init__(self, key: bytes) -> None:
        self.endpoint = Endpoint(key)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setblocking(False)

    def messages(self, timeout_s: float) -> list[tuple[Message, tuple[str, int]]]:
        """Return all messages that are there, waiting for one if there are none."""
        if timeout_s > 0 and not select.select([self.socket], [], [], timeout_s)[0]:
            return []
        found: list[tuple[Message, tuple[str, int]]] = []
        while True:
            try:
                datagram, address = self.socket.recvfrom(_LONGEST)
            except BlockingIOError:
                return found
            except ConnectionError:  # the other side is not there; that is for others to notice
                continue
            message = self.endpoint.read(datagram)
            if message is not None:
                found.append((message, address))

    def send(self, datagram: bytes, address: tuple[str, int]) -> None:
        """Send without waiting; what cannot be sent is lost, as anywhere on the way."""
        try:
            self.socket.sendto(datagram, address)
        except OSError:
            return

    def statistics(self) -> dict[str, int]:
        """Return counts of what was lost or dropped."""
        dropped = {f"dropped: {what}": n for what, n in self.endpoint.dropped.items()}
        return {"lost": self.endpoint.lost, **dropped}


class UdpLink(Link):
    """The controller's side.

    Args:
        address: ``host:port`` of the robot's side.
        key: That both sides know.

    Raises:
        ConfigError: If the address or the key is wrong.
    """

    def __init__(self, address: str, key: bytes) -> None:
        self._address = parse_address(address)
        self._socket = _Socket(key)
        self._ages = Ages()
        self._greeted_s = self._heard_s = -math.inf

    def open(self) -> None:
        """See :class:`~genpol.deploy.links.Link`; a robot may come up later."""
        try:
            self._address = (socket.gethostbyname(self._address[0]), self._address[1])
        except OSError as error:
            raise ConfigError(
                f"link: host {self._address[0]!r} is not known ({error.strerror})"
            ) from None
        self._greet()

    def read(self, timeout_s: float) -> Observed | None:
        """See :class:`~genpol.deploy.links.Link`."""
        newest: Observed | None = None
        deadline = time.monotonic() + timeout_s
        while True:
            now = time.monotonic()
            # A robot whose program begins anew waits for a greeting again.
            if now - max(self._heard_s, self._greeted_s) > _GREETING_S:
                self._greet()
            wait = min(max(0.0, deadline - now), _GREETING_S)
            for message, _ in self._socket.messages(wait):
                found = self._take(message)
                if found is not None:
                    first = found.first or (newest is not None and newest.first)
                    newest = found._replace(first=first)
            if newest is not None or time.monotonic() >= deadline:
                return newest

    def _take(self, message: Message) -> Observed | None:
        """Heed a message; return the observation that it holds."""
        now = time.monotonic()
        endpoint = self._socket.endpoint
        if not message.bound:
            return None
        if message.session != endpoint.peer:  # another process, and perhaps another clock
            if endpoint.peer:
                self._stop = "the robot's program began anew"
            endpoint.peer = message.session
            self._ages = Ages()
        if message.kind is Kind.GREETING:  # the robot obeys whoever knows its session
            self._socket.send(endpoint.message(Kind.GREETING), self._address)
        self._heard_s = now
        delay = self._ages.age(message.sent_s, now)
        match message.kind:
            case Kind.OBSERVATION:
                if message.mode & _STOPPING:
                    self._stop = _ASKED
                measured_s = now - delay - message.age_s
                return Observed(message.numbers, measured_s, bool(message.mode & _FIRST))
            case Kind.STOP:
                self._stop = _ASKED
            case Kind.RESET:
                self._stop, self._reset = "", True
        return None

    def write(self, command: Command) -> None:
        """See :class:`~genpol.deploy.links.Link`; nobody is told before the robot was heard."""
        if not self._socket.endpoint.peer:
            return
        mode = _MODES.index(command.mode)
        datagram = self._socket.endpoint.message(Kind.COMMAND, command.values, mode=mode)
        self._socket.send(datagram, self._address)

    def statistics(self) -> dict[str, int]:
        """See :class:`~genpol.deploy.links.Link`."""
        return self._socket.statistics()

    def close(self) -> None:
        """See :class:`~genpol.deploy.links.Link`."""
        self._socket.socket.close()

    def _greet(self) -> None:
        """Ask for the robot's session, which is not known or no longer answers."""
        self._greeted_s = time.monotonic()
        endpoint = self._socket.endpoint
        known, endpoint.peer = endpoint.peer, 0
        self._socket.send(endpoint.message(Kind.GREETING), self._address)
        endpoint.peer = known


class UdpRobot:
    """The robot's side, for simulations, tests and adapters of real robots.

    Args:
        address: ``host:port`` to listen at; port 0 takes a free one.
        key: That both sides know.

    Attributes:
        address: Where it listens.

    Raises:
        ConfigError: If the address or the key is wrong, or the address is taken.
    """

    def __init__(self, address: str, key: bytes) -> None:
        host, port = parse_address(address)
        self._socket = _Socket(key)
        try:
            self._socket.socket.bind((host, port))
        except OSError as error:
            raise ConfigError(f"link: cannot listen at {address} ({error.strerror})") from None
        self.address = "{}:{}".format(*self._socket.socket.getsockname())
        self._controller: tuple[str, int] | None = None
        self._heard_s = -math.inf
        self._stopping = False

    @property
    def connected(self) -> bool:
        """Whether a controller has greeted it."""
        return self._controller is not None

    @property
    def silence_s(self) -> float:
        """Seconds since the last command: there is one in every period, whatever happens.

        A robot that is told nothing for several periods must stop by itself.
        """
        return time.monotonic() - self._heard_s

    def command(self, timeout_s: float = 0.0) -> Command | None:
        """Return the newest command that was not returned before; ``None`` if none comes.

        Args:
            timeout_s: How long to wait if there is nothing yet.
        """
        newest = None
        endpoint = self._socket.endpoint
        for message, address in self._socket.messages(timeout_s):
            if message.kind is Kind.GREETING:
                self._greeted(message, address)
            elif message.session != endpoint.peer:
                endpoint.dropped["of another controller"] += 1
            elif message.kind is Kind.COMMAND and message.mode < len(_MODES):
                self._heard_s = time.monotonic()
                newest = Command(list(message.numbers), _MODES[message.mode])
        return newest

    def _greeted(self, message: Message, address: tuple[str, int]) -> None:
        """Answer a greeting; obey whoever greets with this process's session."""
        endpoint = self._socket.endpoint
        other = endpoint.peer not in (0, message.session)
        if other and self.silence_s < _TAKEOVER_S:
            endpoint.dropped["greeting while another commands"] += 1
            return
        if message.bound:
            self._controller, endpoint.peer = address, message.session
            return
        before, endpoint.peer = endpoint.peer, message.session
        self._socket.send(endpoint.message(Kind.GREETING), address)
        endpoint.peer = before

    def observation(
        self, values: Sequence[float], *, age_s: float = 0.0, first: bool = False
    ) -> None:
        """Send an observation to whoever greeted last."""
        mode = _FIRST * first + _STOPPING * self._stopping
        message = self._socket.endpoint.message
        self._send(message(Kind.OBSERVATION, values, age_s=age_s, mode=mode))

    def stop(self) -> None:
        """Ask the controller for a stop, with every observation until :meth:`reset`."""
        self._stopping = True
        self._send(self._socket.endpoint.message(Kind.STOP))

    def reset(self) -> None:
        """Ask the controller to go on after a stop."""
        self._stopping = False
        self._send(self._socket.endpoint.message(Kind.RESET))

    def close(self) -> None:
        """Stop listening."""
        self._socket.socket.close()

    def _send(self, datagram: bytes) -> None:
        if self._controller is not None:
            self._socket.send(datagram, self._controller)
