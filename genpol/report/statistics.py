"""What several seeds say together: interquartile means with bootstrap intervals.

The interquartile mean (IQM) drops the lowest and highest quarter of the scores and averages the
rest; its 95 % interval is the percentile interval of a bootstrap over seeds, stratified by
environment (Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the Statistical
Precipice", as implemented in rliable).

An interval says how much the number would move with other seeds. One seed cannot say that, so it
has no interval; of two or three the interval is hardly wider than the scores themselves.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd

from genpol.errors import ConfigError, DatasetError, nearest

REPETITIONS = 2000
CONFIDENCE = 0.95


def scores(
    results: pd.DataFrame,
    *,
    metric: str = "return",
    at: int | None = None,
    budget_s: float | None = None,
) -> pd.DataFrame:
    """Pick one evaluation of every run.

    Args:
        results: Rows of results.
        metric: Which rows to look at.
        at: Take the last evaluation at or under so many environment steps.
        budget_s: Take the last evaluation at or under so many seconds of training.

    Returns:
        One row for each (agent, env, seed): the last evaluation within the limits. Runs that have
        none are left out, and values that are not finite are kept.

    Raises:
        ConfigError: If there is no such metric.
        DatasetError: If there is no evaluation within the limits.
    """
    rows = _of_metric(results, metric)
    if at is not None:
        rows = rows[rows["env_steps"] <= at]
    if budget_s is not None:
        rows = rows[rows["wall_clock_s"] <= budget_s]
    if rows.empty:
        limits = [f"{at} environment steps"] if at is not None else []
        limits += [f"{budget_s:g} s"] if budget_s is not None else []
        raise DatasetError(f"no evaluation of {metric!r} within {' and '.join(limits)}")
    ordered = rows.sort_values("env_steps", kind="stable")
    return ordered.groupby(["agent", "env", "seed"], sort=False).tail(1).reset_index(drop=True)


def summarise(
    results: pd.DataFrame,
    *,
    metric: str = "return",
    at: int | None = None,
    budget_s: float | None = None,
    repetitions: int = REPETITIONS,
    seed: int = 0,
) -> pd.DataFrame:
    """Summarise the seeds of each (agent, env), in the order they first appear.

    ``at`` and ``budget_s`` are as in :func:`scores`; by default every run's last evaluation counts,
    never its best.

    Returns:
        Columns ``agent``, ``env``, ``seeds``, ``env_steps`` and ``agent_steps`` (the least over the
        seeds), ``iqm``, ``low``, ``high`` (NaN with one seed), ``mean``, ``std`` (over seeds, NaN
        with one), ``min``, ``max``, ``episodes`` (the least) and ``wall_clock_s`` (mean).
    """
    picked = scores(results, metric=metric, at=at, budget_s=budget_s)
    order = _of_metric(results, metric)[["agent", "env"]].drop_duplicates()
    rows = []
    for agent, env in order.itertuples(index=False):
        runs = picked[(picked["agent"] == agent) & (picked["env"] == env)]
        if runs.empty:
            continue
        values = runs["value"].to_numpy()
        low, high = iqm_interval(values[:, None], repetitions=repetitions, seed=seed)
        rows.append(
            {
                "agent": agent,
                "env": env,
                "seeds": len(values),
                "env_steps": int(runs["env_steps"].min()),
                "agent_steps": int(runs["agent_steps"].min()),
                "iqm": float(iqm(values[:, None])[()]),
                "low": float(low),
                "high": float(high),
                "mean": float(values.mean()),
                "std": float(values.std(ddof=1)) if len(values) > 1 else np.nan,
                "min": float(values.min()),
                "max": float(values.max()),
                "episodes": int(runs["episodes"].min()),
                "wall_clock_s": float(runs["wall_clock_s"].mean()),
            }
        )
    return pd.DataFrame(rows)


def curves(
    results: pd.DataFrame,
    *,
    metric: str = "return",
    repetitions: int = REPETITIONS,
    seed: int = 0,
) -> pd.DataFrame:
    """Return the IQM over seeds against environment steps, for each (agent, env).

    Runs evaluated at unequal steps are interpolated linearly to the union of these; a curve spans
    only the steps that all its seeds have reached.

    Returns:
        Columns ``agent``, ``env``, ``seeds``, ``env_steps``, ``iqm``, ``low``, ``high``.
    """
    rows = _of_metric(results, metric)
    parts = []
    for (agent, env), runs in rows.groupby(["agent", "env"], sort=False):
        steps, values = _align(runs)
        if not len(steps):
            continue
        low, high = iqm_interval(values[:, None], repetitions=repetitions, seed=seed)
        parts.append(
            pd.DataFrame(
                {
                    "agent": agent,
                    "env": env,
                    "seeds": len(values),
                    "env_steps": steps,
                    "iqm": iqm(values[:, None]),
                    "low": low,
                    "high": high,
                }
            )
        )
    if not parts:
        raise DatasetError(f"no steps of {metric!r} that all seeds of an agent have reached")
    return pd.concat(parts, ignore_index=True)


def iqm(values: np.ndarray) -> np.ndarray:
    """Return the interquartile mean of ``values`` ``[seeds, envs, ...]`` over seeds and envs.

    Equal to ``scipy.stats.trim_mean(values, 0.25)``, at a tenth of its cost for a bootstrap. It is
    NaN wherever a value is: sorted last, a failed seed would fall to the trimming.
    """
    ordered = np.sort(values.reshape(-1, *values.shape[2:]), axis=0)
    cut = len(ordered) // 4
    mean: np.ndarray = ordered[cut : len(ordered) - cut].mean(axis=0)
    return np.where(np.isnan(ordered[-1]), np.nan, mean)


def iqm_interval(
    values: np.ndarray,
    *,
    repetitions: int = REPETITIONS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the stratified bootstrap interval of :func:`iqm`.

    Args:
        values: Scores ``[seeds, envs, ...]``; further axes are points that get an interval each.
        repetitions: Bootstrap samples.
        confidence: Coverage aimed at.
        seed: Seed of the resampling.

    Returns:
        Low and high ends of the shape ``[...]``: NaN where there is one seed, or a value that is
        not finite.
    """
    points = values.reshape(*values.shape[:2], -1)
    low, high = np.full((2, points.shape[2]), np.nan)
    usable = np.isfinite(points).all(axis=(0, 1))
    if len(values) > 1 and usable.any():
        ends = _bootstrap(iqm, points[:, :, usable], repetitions, confidence, seed)
        low[usable], high[usable] = ends
    return low.reshape(values.shape[2:]), high.reshape(values.shape[2:])


def probability_of_improvement(
    results: pd.DataFrame,
    agent: str,
    baseline: str,
    *,
    metric: str = "return",
    at: int | None = None,
    budget_s: float | None = None,
    repetitions: int = REPETITIONS,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Estimate how likely a run of ``agent`` beats one of ``baseline``.

    The Mann-Whitney statistic (ties count half), averaged over the environments in which both ran
    with the same number of seeds in each.

    Returns:
        The probability and its 95 % interval, ``(p, low, high)``; the interval is NaN if either
        agent has one seed.

    Raises:
        ConfigError: If an agent is unknown.
        DatasetError: If an agent has not the same number of seeds everywhere.
    """
    picked = scores(results, metric=metric, at=at, budget_s=budget_s)
    for name in (agent, baseline):
        known = picked["agent"].unique()
        if name not in known:
            raise ConfigError(f"no rows of agent {name!r}.{nearest(name, known)}")
    envs = [set(picked[picked["agent"] == name]["env"]) for name in (agent, baseline)]
    common = sorted(envs[0] & envs[1])
    if not common:
        raise DatasetError(f"{agent!r} and {baseline!r} share no environment")
    first, second = (_matrix(picked, name, common) for name in (agent, baseline))
    chance = float(_improvement(first, second)[0])
    if min(len(first), len(second)) < 2:
        return chance, np.nan, np.nan
    low, high = _bootstrap(_improvement, (first, second), repetitions, CONFIDENCE, seed)
    return chance, float(low[0]), float(high[0])


def _improvement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    wins = (first[:, None] > second[None]) + 0.5 * (first[:, None] == second[None])
    return np.array([wins.mean()])


def _matrix(picked: pd.DataFrame, agent: str, envs: list[str]) -> np.ndarray:
    """Return the agent's scores ``[seeds, envs]``."""
    columns = [
        picked[(picked["agent"] == agent) & (picked["env"] == env)]["value"].to_numpy()
        for env in envs
    ]
    if len({len(column) for column in columns}) > 1:
        counts = ", ".join(f"{env}: {len(c)}" for env, c in zip(envs, columns, strict=True))
        raise DatasetError(f"agent {agent!r} has unequal numbers of seeds ({counts})")
    return np.stack(columns, axis=1)


def _of_metric(results: pd.DataFrame, metric: str) -> pd.DataFrame:
    rows = results[results["metric"] == metric]
    if rows.empty:
        known = sorted(results["metric"].unique())
        raise ConfigError(
            f"no rows with metric {metric!r}.{nearest(metric, known)} "
            f"Recorded: {', '.join(known) or 'none'}"
        )
    # Learning from a data set takes no environment steps: there updates are the clock.
    if not on_data(rows):
        return rows
    updates = rows["gradient_steps"]
    return rows.assign(env_steps=updates, agent_steps=updates)


def on_data(rows: pd.DataFrame) -> bool:
    """Return whether rows are those of runs that never stepped an environment to learn."""
    if "gradient_steps" not in rows or (rows["env_steps"] > 0).any():
        return False
    return bool((rows["gradient_steps"] > 0).any())


def _align(runs: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps that all seeds span ``[points]`` and their values ``[seeds, points]``."""
    seeds = [
        run.sort_values("env_steps").drop_duplicates("env_steps", keep="last")
        for _, run in runs.groupby("seed")
    ]
    steps = np.unique(np.concatenate([run["env_steps"].to_numpy() for run in seeds]))
    first = max(run["env_steps"].min() for run in seeds)
    last = min(run["env_steps"].max() for run in seeds)
    steps = steps[(steps >= first) & (steps <= last)]
    values = [np.interp(steps, run["env_steps"], run["value"]) for run in seeds]
    return steps, np.stack(values)


def _bootstrap(
    statistic: Callable[..., np.ndarray],
    values: np.ndarray | tuple[np.ndarray, ...],
    repetitions: int,
    confidence: float,
    seed: int,
) -> np.ndarray:
    """Return the percentile interval ``[2, ...]`` of ``statistic`` by rliable's bootstrap."""
    from rliable import library  # costs more than a second

    with _seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        _, intervals = library.get_interval_estimates(
            {"": values}, statistic, reps=repetitions, confidence_interval_size=confidence
        )
    return np.asarray(intervals[""])


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator for a while.

    rliable 1.2 takes a ``random_state`` but draws its resamples from the global generator.
    """
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
