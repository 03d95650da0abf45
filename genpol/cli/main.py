"""The entry point: finds the command, prints help and turns errors into one line."""

from __future__ import annotations

import ctypes
import errno
import importlib
import os
import select
import sys
from collections.abc import MutableMapping, Sequence
from types import ModuleType

from genpol import __version__
from genpol.errors import ConfigError, GenpolError, nearest

# One module per command, imported only when it is asked for. Each has SUMMARY and USAGE for the
# help and run(arguments) -> exit code, and imports torch, hydra and the like inside run, because
# torch, tensordict and torchrl take four seconds and help must not wait for them.
COMMANDS = {
    "train": "genpol.cli.train",
    "eval": "genpol.cli.eval",
    "bench": "genpol.cli.bench",
    "reproduce": "genpol.cli.reproduce",
    "report": "genpol.cli.report",
    "data": "genpol.cli.data",
    "policies": "genpol.cli.policies",
    "export": "genpol.cli.export",
    "deploy": "genpol.cli.deploy",
    "info": "genpol.cli.info",
    "list": "genpol.cli.list",
}

_HELP = ("-h", "--help")
_STORAGE_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT)
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        arguments: What follows ``genpol`` on the command line; ``None`` takes ``sys.argv``.

    Returns:
        0 on success, 2 on wrong input, 130 on Ctrl-C, 1 or the command's own code otherwise.
    """
    prepare_process(os.environ)
    try:
        code = _dispatch(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()  # here, so that a closed pipe is seen before the interpreter's exit
    except GenpolError as error:
        sys.stderr.write(f"genpol: error: {' '.join(str(error).split())}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("genpol: interrupted\n")
        return _INTERRUPTED
    except BrokenPipeError:
        if not _stdout_is_closed():
            raise  # another pipe broke, say that of a worker process: not to be hushed
        # The reader went away (`genpol list envs | head -1`). Python would complain again when it
        # flushes stdout at exit, so give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in _STORAGE_ERRORS:
            raise
        place = error.filename or "the run folder"
        sys.stderr.write(
            f"genpol: error: {place}: cannot be written ({error.strerror}); what was saved before"
            " is intact; free some space, or choose another folder with output=<folder>\n"
        )
        return 1
    return code


def prepare_process(environ: MutableMapping[str, str]) -> None:
    """Set what must stand in the environment before torch and mujoco are loaded.

    That is a launcher's job: a library that changes its host's environment on import would be a
    nuisance, and after the import it is too late. Values that the user set are left alone.
    """
    # After each parallel region, GNU OpenMP's workers spin for milliseconds in wait of the next
    # one, on the cores that the physics threads need. A short spin is worth up to 1.6 times the
    # training speed on two cores, and costs torch nothing.
    environ.setdefault("GOMP_SPINCOUNT", "20000")
    environ.setdefault("RL_LOGGING_LEVEL", "WARNING")  # torchrl tells of every buffer it makes
    if sys.platform == "linux" and "DISPLAY" not in environ and _loads("libEGL.so.1"):
        # Without a display MuJoCo's default, GLFW, cannot render; EGL can, also in software. Where
        # EGL is missing, naming it would make the import of mujoco fail.
        environ.setdefault("MUJOCO_GL", "egl")


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def _stdout_is_closed() -> bool:
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in (*_HELP, "help"):
        return _help(arguments[1:])
    if arguments[0] in ("-V", "--version"):
        sys.stdout.write(f"genpol {__version__}\n")
        return 0
    command = _load(arguments[0])
    if any(argument in _HELP for argument in arguments[1:]):
        sys.stdout.write(_usage(command, arguments[1:]))
        return 0
    code: int = command.run(arguments[1:])
    return code


def _help(topics: list[str]) -> int:
    if topics:
        sys.stdout.write(_usage(_load(topics[0]), topics[1:]))
        return 0
    lines = ["genpol: reinforcement learning with generative policies", ""]
    lines += ["usage: genpol <command> [key=value ...]", "", "commands:"]
    lines += [f"  {name:<10}{summary}" for name, summary in _summaries().items()]
    lines += ["", "  genpol train env=HopperStand     trains GoRL on a laptop"]
    lines += ["  genpol <command> --help          explains one command"]
    lines += ["  genpol --version                 prints the version"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _usage(command: ModuleType, arguments: list[str]) -> str:
    """Return the help of a command, or of its action that ``arguments`` begin with."""
    usage_of = getattr(command, "usage_of", None)
    text: str = command.USAGE if usage_of is None else usage_of(arguments)
    return text.strip() + "\n"


def _summaries() -> dict[str, str]:
    found = {name: _find(name) for name in COMMANDS}
    return {name: module.SUMMARY for name, module in found.items() if module is not None}


def _load(name: str) -> ModuleType:
    if name not in COMMANDS:
        raise ConfigError(
            f"unknown command {name!r}.{nearest(name, COMMANDS)} `genpol --help` shows all"
        )
    module = _find(name)
    if module is None:
        raise ConfigError(f"command {name!r} is not part of this installation of genpol")
    return module


def _find(name: str) -> ModuleType | None:
    """Import a command's module, or return ``None`` if this installation lacks it."""
    try:
        return importlib.import_module(COMMANDS[name])
    except ModuleNotFoundError as error:
        if error.name != COMMANDS[name]:
            raise
        return None


if __name__ == "__main__":
    sys.exit(main())
