"""Joining a cluster of Ray, or starting Ray on this machine."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from genpol.errors import GenpolError


def join(ray: Any, num_cpus: int | None = None) -> bool:
    """Join the cluster of ``RAY_ADDRESS`` or of an earlier ``ray start``, else start Ray here.

    Args:
        ray: The package.
        num_cpus: Cores that Ray is to count if it is started; ``None`` for those that there are.

    Returns:
        Whether this process is to leave the cluster; not if its host had joined before.

    Raises:
        GenpolError: If there is no cluster where one is said to be, or Ray does not start.
    """
    if ray.is_initialized():
        return False
    quiet = {"log_to_driver": False, "logging_level": "error"}
    here = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False}
    try:
        with _keeping_sigterm():
            try:
                ray.init(**quiet, **here, **({"num_cpus": num_cpus} if here else {}))
            except ValueError:  # of an earlier `ray start`, whose cores are counted already
                ray.init(**quiet)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise GenpolError(
            f"Ray: no cluster is there, nor could one be started here ({reason}); see RAY_ADDRESS, "
            "or leave it unset for this machine alone"
        ) from None
    return True


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Leave SIGTERM to whom it belongs: by Ray's handler, a run would end without a checkpoint."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)
