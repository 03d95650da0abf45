"""Tasks of an earlier run, known by their names."""

from __future__ import annotations

from collections.abc import Sequence

from genpol.errors import ConfigError


def earlier_rows(
    names: Sequence[str], earlier: Sequence[str], *, number: int, like: str
) -> list[int]:
    """Return which of an earlier run's embeddings tasks begin with.

    Args:
        names: Of the tasks.
        earlier: Tasks of that run in the order of its embeddings.
        number: Embeddings that it has.
        like: The task whose embedding those have that it does not know.

    Raises:
        ConfigError: If it is not known which embedding is whose, or which a new task shall have.
    """
    if len(earlier) != number:
        raise ConfigError(
            f"init: its run learned {number} tasks, and its config.yaml names {len(earlier)} in "
            "env.tasks; name a run folder as genpol left it"
        )
    new = [name for name in names if name not in earlier]
    if new and like not in earlier:
        raise ConfigError(
            f"agent.like_task = {like!r}: the run of init does not know {', '.join(new)}; give the "
            f"one of its tasks, {', '.join(earlier)}, that these are like"
        )
    return [earlier.index(like if name in new else name) for name in names]
