"""Links to robots: a new one is one small class."""

from __future__ import annotations

from genpol.deploy.links.base import Link, Observed

__all__ = ["Link", "Observed"]
