"""The run folder as ranks see it that write nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from genpol.training.run import Run


class SilentRun(Run):
    """A run folder to which another rank writes.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.videos = path / "videos"
        self.config = {}
        self.record = {"env": "", "agent": ""}

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Leave it to the other rank, as all that follows."""

    def log_evaluation(self, *args: Any, **kwargs: Any) -> None:
        """See :meth:`log_metrics`."""

    def resume(self, *args: Any, **kwargs: Any) -> None:
        """See :meth:`log_metrics`."""

    def check_tables(self) -> None:
        """See :meth:`log_metrics`."""

    def truncate_to(self, *args: Any, **kwargs: Any) -> None:
        """See :meth:`log_metrics`."""

    def finish(self, *args: Any, **kwargs: Any) -> None:
        """See :meth:`log_metrics`."""
