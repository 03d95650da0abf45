"""How clusters of Ray are joined, with the errors and habits of Ray 2.60 played by a stand-in."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from genpol.errors import GenpolError
from genpol.training import ray_cluster


class Ray:
    """What joining asks of Ray."""

    def __init__(self, *, running: bool = False, joined: bool = False, error: str = "") -> None:
        self.running, self.joined, self.error = running, joined, error
        self.calls: list[dict[str, Any]] = []

    def is_initialized(self) -> bool:
        return self.joined

    def init(self, **options: Any) -> None:
        self.calls.append(options)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if self.error:
            raise RuntimeError(self.error)
        if self.running and options.get("num_cpus") is not None:
            raise ValueError("When connecting to an existing cluster, num_cpus must not be given.")


@pytest.fixture(autouse=True)
def _no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_ray_is_started_with_so_many_cores() -> None:
    ray = Ray()
    assert ray_cluster.join(ray, num_cpus=3)
    assert [call["num_cpus"] for call in ray.calls] == [3]


def test_the_cluster_of_an_earlier_ray_start_is_joined_as_it_is() -> None:
    ray = Ray(running=True)
    assert ray_cluster.join(ray, num_cpus=3)
    assert "num_cpus" not in ray.calls[-1]


def test_the_cluster_of_the_address_is_joined_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    ray = Ray()
    assert ray_cluster.join(ray, num_cpus=3)
    assert [call.keys() & {"num_cpus", "include_dashboard"} for call in ray.calls] == [set()]


def test_a_cluster_that_the_host_joined_stays_the_hosts() -> None:
    ray = Ray(joined=True)
    assert not ray_cluster.join(ray)
    assert ray.calls == []


def test_sigterm_stays_the_runs() -> None:
    before = signal.getsignal(signal.SIGTERM)
    ray_cluster.join(Ray())
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_cluster_that_is_not_there_is_told_in_one_line() -> None:
    with pytest.raises(GenpolError, match=r"could one be started here \(no GCS at 10\.0\.0\.1\)"):
        ray_cluster.join(Ray(error="no GCS\nat 10.0.0.1"))
