"""`genpol eval`: evaluate a trained policy on complete episodes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from genpol.errors import ConfigError

SUMMARY = "evaluate a trained policy"
USAGE = """
usage: genpol eval <run folder or checkpoint> [episodes=100] [seed=20000]
                   [stochastic=false] [video=<file.mp4>] [json=false] [key=value ...]

Loads the last checkpoint of a run (or the one named) and runs complete episodes from start states
that neither training nor its evaluations used. Prints mean, 95 % interval, spread and value at
risk of the return. Other overrides change the run's own settings, such as env.num_threads=1.

examples:
  genpol eval runs/HopperStand/gorl/20261122-101500-s0
  genpol eval runs/HopperStand/gorl/20261122-101500-s0 episodes=500 video=hopper.mp4
"""

_OWN = {"episodes": 100, "seed": 20_000, "stochastic": False, "video": "", "json": False}


def run(arguments: list[str]) -> int:
    """Evaluate one checkpoint and print the outcome."""
    if not arguments or "=" in arguments[0]:
        raise ConfigError("no run given; write: genpol eval <run folder>")
    path = Path(arguments[0])
    options: dict[str, Any] = dict(_OWN)
    overrides: list[str] = []
    for text in arguments[1:]:
        key, separator, value = text.partition("=")
        if separator and key in _OWN:
            options[key] = _parse(key, value)
        else:
            overrides.append(text)

    import torch

    from genpol.cli import configuration
    from genpol.cli.train import build, record_video
    from genpol.seeding import derive
    from genpol.training import checkpoint
    from genpol.training.evaluation import evaluate
    from genpol.training.loop import load_weights

    found = checkpoint.resolve(path)
    config = checkpoint.run_folder(found) / "config.yaml"
    settings = configuration.to_settings(configuration.load(config, overrides))
    agent, make_env = build(settings)
    load_weights(agent, checkpoint.load(found)["weights"], found)
    episodes, seed = options["episodes"], options["seed"]
    seed = derive(seed, "test")
    agent.generator.manual_seed(seed)
    env = make_env(num_envs=min(episodes, settings.num_envs), seed=seed)
    try:
        result = evaluate(
            agent.policy,
            env,
            episodes=episodes,
            seed=seed,
            deterministic=not options["stochastic"],
        )
    finally:
        env.close()
    returns = result.returns.double()
    summary: dict[str, Any] = {"checkpoint": str(found), **result.summary()}
    if len(returns) > 1:
        half = 1.96 * float(returns.std()) / len(returns) ** 0.5
        summary |= {
            "return_low": summary["return_mean"] - half,
            "return_high": summary["return_mean"] + half,
        }
        for share in (0.05, 0.25):
            worst = torch.sort(returns).values[: max(1, round(share * len(returns)))]
            summary[f"value_at_risk_{share:.0%}"] = float(worst[-1])
            summary[f"conditional_value_at_risk_{share:.0%}"] = float(worst.mean())
    _print(summary, as_json=options["json"])
    if options["video"]:  # last, so that the numbers are out if it cannot be written
        record_video(agent, make_env, Path(options["video"]), seed)
    return 0


def _parse(key: str, value: str) -> Any:
    """Return ``value`` as the type that option ``key`` has."""
    kind = type(_OWN[key])
    if kind is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if kind is int and value.isdigit() and (int(value) > 0 or key == "seed"):
        return int(value)
    if kind is str and value.lower().endswith(".mp4"):
        return value
    expected = {
        bool: "true or false",
        int: "a whole number > 0",
        str: "a file name that ends in .mp4",
    }[kind]
    raise ConfigError(f"{key} = {value!r}: must be {expected}")


def _print(summary: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        finite = {k: None if v != v else v for k, v in summary.items()}  # JSON has no NaN
        sys.stdout.write(json.dumps(finite) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    sys.stdout.write(f"{summary.pop('checkpoint')}\n")
    table = Table(show_header=False)
    for name, value in summary.items():
        shown = f"{value:.1f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), shown)
    Console().print(table)
