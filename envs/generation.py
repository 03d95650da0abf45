"""Generation of data sets by scripted players: many episodes at once, a file of all in the end.

Every episode that is finished is a file in a staging folder beside the result, so that an
interrupted generation goes on where it stopped, whatever stopped it. Which worker makes an episode
makes no difference to it, so neither do the number of workers and interruptions.

The result is two files as OGBench's, ``NAME.npz`` and, with a tenth as many episodes,
``NAME-val.npz``. How they came about stands in the ZIP files' comments, as JSON. What is played
and how is the matter of a :class:`Recipe`.
"""

from __future__ import annotations

import filecmp
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from genpol.data.staging import Staging, flush, writing
from genpol.errors import ConfigError, EnvironmentFault

SPLITS = ("train", "val")

_PATIENCE_S = 0.25


class Demonstrator(Protocol):
    """An environment with what plays in it."""

    def episode(self, split: str, index: int) -> dict[str, np.ndarray]:
        """Play one episode, which depends on the recipe and these two alone.

        Args:
            split: ``"train"`` or ``"val"``, which share no episode.
            index: Number of the episode within its split.

        Returns:
            Columns as OGBench's files have them, ``[T + 1, ...]``: ``observations``, ``actions``,
            ``terminals``, which is True in the last row alone, and others, of all episodes alike.
        """


class Recipe(Protocol):
    """What determines the episodes of a data set; it is sent to worker processes."""

    @property
    def name(self) -> str:
        """The environment's name, for messages."""

    def provenance(self) -> dict[str, Any]:
        """Return all that the data depend on, as JSON can say it."""

    def comment(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return the comment of a file: the provenance with further facts, as it is to be read."""

    def demonstrator(self) -> Demonstrator:
        """Return a player."""


@dataclass(frozen=True)
class Plan:
    """Which episodes are to be made.

    Attributes:
        recipe: How.
        episodes: How many of each split, ``"train"`` and ``"val"``.
    """

    recipe: Recipe
    episodes: dict[str, int]

    @classmethod
    def of_size(cls, recipe: Recipe, episodes: int) -> Plan:
        """Plan so many episodes to train on, and a tenth of that for validation."""
        return cls(recipe, {"train": episodes, "val": max(1, episodes // 10)})

    @property
    def num_episodes(self) -> int:
        """Number of episodes of both splits."""
        return sum(self.episodes.values())

    def files(self) -> Iterator[tuple[str, int, str]]:
        """Yield each episode's split, number and file name."""
        for split in SPLITS:
            for index in range(self.episodes[split]):
                yield split, index, f"{split}-{index:07d}.npz"


class Generation:
    """A generation under way, or taken up again.

    Args:
        plan: Which episodes to make.
        output: The file of the training episodes; the others' gets ``-val`` before its suffix.

    Attributes:
        folder: Where the episodes are kept until the end.

    Raises:
        ConfigError: If the episodes in the staging folder follow another recipe.
        DatasetError: If a result exists, another process makes it, or it cannot be written.
    """

    def __init__(self, plan: Plan, output: Path) -> None:
        self.plan = plan
        self.output = output
        self.validation_output = output.with_name(f"{output.stem}-val{output.suffix}")
        self._provenance = plan.recipe.provenance()
        self._staging = Staging(output)
        self.folder = self._staging.folder
        try:
            self._check_recipe()
        except BaseException:
            self.close()
            raise

    def _check_recipe(self) -> None:
        begun = any(self.folder.iterdir())
        if not begun and os.path.lexists(self.validation_output):
            raise ConfigError(
                f"output = {str(self.output)!r}: {self.validation_output} exists; nothing is "
                "overwritten, choose another name"
            )
        self._staging.claim(self._provenance)

    def missing(self) -> list[tuple[str, int, str]]:
        """Return the episodes that are not there yet, as :meth:`Plan.files` gives them."""
        there = {path.name for path in self.folder.iterdir()}
        return [episode for episode in self.plan.files() if episode[2] not in there]

    def run(
        self,
        num_workers: int,
        *,
        on_episode: Callable[[], None] = lambda: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Make what is missing and return whether all is there.

        Args:
            num_workers: Processes that make episodes.
            on_episode: Called for every episode that is finished.
            stop: Asked now and then whether to stop, unfinished.

        Raises:
            EnvironmentFault: If a worker dies or its environment raises.
        """
        missing = self.missing()
        if not missing:
            return True
        with _workers(min(num_workers, len(missing)), self.plan.recipe, self.folder) as workers:
            waiting = iter(missing)
            for connection in workers:
                connection.send(next(waiting))
            left = len(missing)
            while left > 0 and not stop():
                ready: list[Any] = multiprocessing.connection.wait(list(workers), _PATIENCE_S)
                for connection in ready:
                    _receive(connection, workers[connection])
                    on_episode()
                    left -= 1
                    following = next(waiting, None)
                    if following is not None:
                        connection.send(following)
        return left == 0

    def finish(self) -> dict[Path, int]:
        """Put the episodes together, the files in their places, and remove the staging folder.

        Returns:
            The number of transitions in each file.

        Raises:
            DatasetError: If a file cannot be written, or another of its name came up meanwhile.
        """
        transitions = {}
        targets = {"train": self.output, "val": self.validation_output}
        with writing(self.output):
            for split, target in targets.items():
                names = [name for found, _, name in self.plan.files() if found == split]
                made = self.folder / f"{split}.npz"
                comment = self.plan.recipe.comment({"split": split, "episodes": len(names)})
                rows = write_npz(made, [self.folder / name for name in names], comment)
                transitions[target] = rows - len(names)
                flush(made)
            self._place_validation()
        self._staging.place(self.folder / "train.npz")
        self._staging.discard()
        return transitions

    def _place_validation(self) -> None:
        # It is first in its place; if the second is late, for the lack of power say, the one that
        # the next attempt makes is the same.
        made = self.folder / "val.npz"
        if not os.path.lexists(self.validation_output):
            made.rename(self.validation_output)
        elif not filecmp.cmp(made, self.validation_output, shallow=False):
            raise ConfigError(
                f"{self.validation_output}: exists by now; move it away and repeat the command"
            )

    def close(self) -> None:
        """Let other processes have the staging folder; what lies in it stays."""
        self._staging.release()


def write_npz(path: Path, episodes: Sequence[Path], comment: dict[str, Any]) -> int:
    """Concatenate ``.npz`` files of equal keys and widths, one episode in memory at a time.

    Args:
        path: The file to write.
        episodes: The files to read, in this order.
        comment: Put as JSON into the comment of the ZIP file.

    Returns:
        The number of rows.
    """
    with np.load(episodes[0]) as arrays:
        examples = {key: arrays[key] for key in arrays.files}
    num_rows = sum(_num_rows(episode) for episode in episodes)
    # Stored without compression, which would gain a tenth: noise fills the digits of floats.
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = json.dumps(comment).encode()
        for key, example in examples.items():
            # A ZipInfo has the same date always, so that equal data are equal files.
            member = zipfile.ZipInfo(f"{key}.npy")
            with archive.open(member, "w", force_zip64=True) as stream:
                header = np.lib.format.header_data_from_array_1_0(example)
                header["shape"] = (num_rows, *example.shape[1:])
                np.lib.format.write_array_header_1_0(stream, header)
                for episode in episodes:
                    with np.load(episode) as arrays:
                        stream.write(arrays[key].tobytes())
    return num_rows


def _num_rows(episode: Path) -> int:
    with np.load(episode) as arrays:
        return len(arrays["terminals"])


@contextmanager
def _workers(number: int, recipe: Recipe, folder: Path) -> Iterator[dict[Connection, BaseProcess]]:
    """Give as many processes that make episodes, and end them in whatever they do."""
    workers: dict[Connection, BaseProcess] = {}
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context(
        "forkserver" if "forkserver" in methods else "spawn"  # not forked from among threads
    )
    try:
        for index in range(number):
            here, there = context.Pipe()
            worker = context.Process(
                target=_work, args=(there, recipe, folder), name=str(index), daemon=True
            )
            worker.start()
            there.close()  # so that the pipe ends with the process
            workers[here] = worker
        yield workers
    finally:
        for connection, worker in workers.items():
            connection.close()
            worker.kill()
            worker.join()


def _work(connection: Connection, recipe: Recipe, folder: Path) -> None:
    """Make the episodes that are asked for until the main process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process' to heed
    with suppress(EOFError):
        try:
            demonstrator = recipe.demonstrator()
            while True:
                split, index, name = connection.recv()
                _save(folder / name, demonstrator.episode(split, index))
                connection.send(None)
        except EOFError:
            raise
        except Exception as error:
            with suppress(OSError):  # the main process is gone, which may be the error itself
                connection.send(error if isinstance(error, OSError) else _fault(recipe, error))


def _fault(recipe: Recipe, error: Exception) -> EnvironmentFault:
    message = " ".join(str(error).split())
    return EnvironmentFault(f"environment {recipe.name} raised {type(error).__name__}: {message}")


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write a file that is whole or absent under its name."""
    unfinished = path.with_suffix(".partial")
    with unfinished.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    flush(unfinished)
    unfinished.replace(path)


def _receive(connection: Connection, worker: BaseProcess) -> None:
    """Take a worker's word that its episode is finished, or raise what went wrong."""
    try:
        answer = connection.recv()
    except (EOFError, ConnectionError):
        worker.join()
        code = worker.exitcode
        how = f"was killed by signal {-code}" if code is not None and code < 0 else "died"
        raise EnvironmentFault(
            f"worker {worker.name} {how} (is memory short?); the same command goes on, "
            "with fewer workers if you set num_workers="
        ) from None
    if answer is not None:
        raise answer
