"""Errors a user meets: each is one line that says what, where and how to mend it."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class GenpolError(Exception):
    """Base of every error that genpol raises on purpose; the command line prints it as one line."""

    exit_code = 1


class ConfigError(GenpolError):
    """A setting, name or override is wrong."""

    exit_code = 2


class DatasetError(GenpolError):
    """A data file is truncated, mislabelled or inconsistent."""


class CheckpointError(GenpolError):
    """A checkpoint cannot be written, is damaged, or belongs to something else."""


class NonFiniteError(GenpolError):
    """Losses or gradients stayed non-finite for too many updates in a row."""


class SafetyStop(GenpolError):  # noqa: N818 - a stop, not an error, to those who read the log
    """The safety filter stopped the robot."""


class EnvironmentFault(GenpolError):  # noqa: N818
    """An environment or one of its workers died."""


class MissingExtraError(GenpolError):
    """An optional package is not installed."""

    exit_code = 2


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: Name of the package to import.
        extra: The extra of genpol that installs it.

    Raises:
        MissingExtraError: If the package is missing; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"package {module!r} is not installed; run: pip install 'genpol[{extra}]'"
        ) from None


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest candidate, or an empty string."""
    by_folded = {candidate.casefold(): candidate for candidate in candidates}
    close = difflib.get_close_matches(name.casefold(), by_folded, n=1, cutoff=0.4)
    return f" Did you mean {by_folded[close[0]]!r}?" if close else ""
