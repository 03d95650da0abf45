"""What a number was measured with: the commit of the code and the machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parent
_CODE = ("genpol", "agents", "envs", "configs", "pyproject.toml")


@dataclass(frozen=True)
class GitState:
    """Where a checkout stands.

    Attributes:
        commit: Hash of its head, in full.
        dirty: Whether its code differs from that, files not yet added included. Results are
            written while runs go on and are no change of the code.
    """

    commit: str
    dirty: bool


def git_state(file: Path = _PACKAGE / "__init__.py") -> GitState | None:
    """Return the state of the checkout that tracks ``file`` (genpol's own by default), or ``None``.

    A copy installed somewhere inside another project's checkout is not tracked by it.
    """

    def git(*arguments: str) -> str:
        return _output("git", "-C", str(file.parent), *arguments)

    try:
        git("ls-files", "--error-unmatch", file.name)
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--", *(f":(top){path}" for path in _CODE))
    except (OSError, subprocess.SubprocessError):
        return None
    return GitState(commit, bool(changes))


def code_version() -> str:
    """Return the commit in 12 digits, with ``+changes`` if the code differs; else the version."""
    state = git_state()
    if state is None:
        from genpol import __version__

        return f"v{__version__}"
    return state.commit[:12] + ("+changes" if state.dirty else "")


def usable_cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def processor() -> str:
    """Return the processor's marketing name, which only Linux keeps in a file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> str:
    """Describe the machine: processor, usable cores, memory and GPU."""
    import psutil

    gpu = ""
    if shutil.which("nvidia-smi"):
        try:
            gpu = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
        except (OSError, subprocess.SubprocessError):
            gpu = ""
    memory = psutil.virtual_memory().total / 2**30
    parts = [processor(), f"{usable_cores()} cores", f"{memory:.0f} GiB", gpu.partition("\n")[0]]
    return ", ".join(part for part in parts if part)


def _output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()
