"""Files and folders that are whole or absent: made in a staging folder beside, then moved.

The staging folder of ``NAME`` is ``.tmp-NAME``. It belongs to one process at a time: an advisory
lock on it, which the system drops when the process ends however it ends, tells a leftover from work
in progress. Where the file system knows no locks, nothing keeps two processes apart.

What takes hours to make stays in the folder when it is interrupted, with a recipe that tells what
it is (:meth:`Staging.claim`): the same command goes on with it, and any other leaves it alone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from genpol.errors import ConfigError, DatasetError

if sys.platform != "win32":
    import fcntl

_PREFIX = ".tmp-"
_RECIPE = "recipe.json"
_MADE = "made"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Staging:
    """The staging folder of one target, taken for this process.

    Args:
        target: What is to be made. It must not exist; its parents are made.
        wait: Wait for another process that is making the target, instead of refusing.

    Attributes:
        folder: The staging folder, with what an interrupted process left in it.

    Raises:
        DatasetError: If the target exists, is being made by another process, or its folder cannot
            be written.
    """

    def __init__(self, target: Path, *, wait: bool = False) -> None:
        self.target = target
        self.folder = target.with_name(f"{_PREFIX}{target.name}")
        self._lock: int | None = None
        self._owned = False
        with writing(target):
            while not self._owned:
                self._owned = self._take(wait)

    @classmethod
    def empty(cls, target: Path) -> Staging:
        """Take the staging folder of ``target`` without what may lie in it.

        Raises:
            DatasetError: As the class does, and as :meth:`clear` does.
        """
        staging = cls(target)
        try:
            staging.clear()
        except BaseException:
            staging.release()
            raise
        return staging

    def claim(self, recipe: Mapping[str, Any]) -> None:
        """See that what lies in the folder was made by ``recipe``, and note that for the next time.

        A folder without a recipe is cleared.

        Args:
            recipe: All that decides on the result, as JSON can say it.

        Raises:
            ConfigError: If an interrupted process followed another recipe.
            DatasetError: If the folder cannot be written.
        """
        file = self.folder / _RECIPE
        wanted = json.loads(json.dumps(recipe))  # as it will be read
        with writing(self.target):
            if not file.exists():
                self.clear()
                unfinished = file.with_suffix(".partial")
                unfinished.write_text(json.dumps(wanted), encoding="utf-8")
                flush(unfinished)
                unfinished.replace(file)
                return
            found = _read_recipe(file)
        if found != wanted:
            raise ConfigError(
                f"{self.folder}: holds what an interrupted command made of "
                f"{_differences(found, wanted)}; repeat that command, remove the folder to begin "
                "anew, or choose another output"
            )

    def clear(self) -> None:
        """Remove all that lies in the folder.

        Raises:
            DatasetError: If that is the work of an interrupted command, which can go on with it.
        """
        if (self.folder / _RECIPE).exists():
            raise DatasetError(
                f"{self.folder}: holds what an interrupted command made, which can go on with it; "
                "remove the folder, or choose another name"
            )
        with writing(self.target):
            for entry in self.folder.iterdir():
                _remove(entry)

    def place(self, made: Path) -> None:
        """Move ``made``, the folder itself or something in it, to the target and make that durable.

        Raises:
            DatasetError: If the target exists by now, or cannot be made. Nothing is overwritten.
        """
        refuse_existing(self.target)
        with writing(self.target):
            if made.is_dir():
                made.rename(self.target)
            else:
                _move_file(made, self.target)
            flush(self.target.parent)

    def release(self) -> None:
        """Let other processes have the folder; what lies in it stays."""
        self._owned = False
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def discard(self) -> None:
        """Remove the folder and all in it, if it still belongs to this process."""
        if self._owned:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.release()

    def _take(self, wait: bool) -> bool:
        """Make the folder if need be and lock it; return whether it still is the one locked."""
        refuse_existing(self.target)
        self.folder.mkdir(parents=True, exist_ok=True)
        if sys.platform == "win32":
            return True
        try:
            self._lock = os.open(self.folder, os.O_RDONLY)
            lock(self._lock, self.target, wait)
            # Whoever had it before may have moved it into place or removed it.
            if os.path.samestat(os.fstat(self._lock), self.folder.stat()):
                return True
        except FileNotFoundError:
            pass
        except DatasetError:
            self.release()
            raise
        self.release()
        return False


@contextlib.contextmanager
def staged(target: Path, staging: Staging | None = None) -> Iterator[Path]:
    """Give a path to write to, which becomes ``target`` if all goes well.

    Args:
        target: What is to be made.
        staging: Its staging folder, if the caller has taken it: what else lies there stays.

    Raises:
        DatasetError: If the target exists or cannot be written. Nothing is left behind.
    """
    taken = staging or Staging.empty(target)
    made = taken.folder / _MADE
    try:
        with writing(target):
            _remove(made)
            yield made
            for path in (made, *made.rglob("*")):
                flush(path)
        taken.place(made)
    finally:
        if staging is None:
            taken.discard()
        else:
            with contextlib.suppress(OSError):  # of no account beside what went wrong before
                _remove(made)


def refuse_existing(target: Path) -> None:
    """Refuse to make what exists.

    Raises:
        DatasetError: If ``target`` does, be it as a broken link.
    """
    if os.path.lexists(target):
        raise DatasetError(f"{target}: exists; nothing is overwritten, choose another name")


@contextlib.contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn an error of the operating system into one line about ``target``.

    Raises:
        DatasetError: If such an error occurs.
    """
    try:
        yield
    except OSError as error:
        mend = "free some disk space" if error.errno in _FULL else "choose a folder you may write"
        reason = error.strerror or " ".join(str(error).split())
        raise DatasetError(f"{target}: cannot be written ({reason}); {mend}") from error


def flush(path: Path) -> None:
    """Force a file, or the entries of a folder, onto the disk."""
    if path.is_dir() and sys.platform == "win32":
        return  # Windows opens no folder, and orders its metadata by itself
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_recipe(file: Path) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    raise ConfigError(f"{file}: damaged; remove {file.parent} to begin anew")


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    keys = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    return ", ".join(f"{key} {found.get(key)} and not {wanted.get(key)}" for key in keys)


def lock(descriptor: int, target: Path, wait: bool) -> None:
    """Lock an open file, until it is closed; Windows and some network drives go without.

    Args:
        descriptor: Of the file.
        target: What is locked by it, for the message.
        wait: Whether to wait for another process that has it.

    Raises:
        DatasetError: If another process has it and there is no waiting.
    """
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise DatasetError(
            f"{target}: another process is writing it; wait for it to end, or stop it"
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF):
            raise


def _move_file(made: Path, target: Path) -> None:
    try:
        os.link(made, target)  # unlike a rename, replaces nothing that came up meanwhile
    except FileExistsError:
        refuse_existing(target)
        raise
    except OSError:  # a file system without hard links
        made.rename(target)
