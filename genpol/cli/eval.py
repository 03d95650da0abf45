"""`genpol eval`: evaluate a trained policy on complete episodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from genpol.report.risk import Measure
    from genpol.training.evaluation import Evaluation

SUMMARY = "evaluate a trained policy"
USAGE = """
usage: genpol eval <run folder, checkpoint or policy folder> [episodes=100] [seed=20000]
                   [stochastic=false] [video=<file.mp4>] [json=false] [key=value ...]

Loads the last checkpoint of a run (or the one named) and runs complete episodes from start states
that neither training nor its evaluations used. Prints mean, 95 % interval, spread and value at
risk of the return; with json=true also the return of each episode, in the order of the start
states, which allows comparing policies in pairs. Other overrides change the run's own settings,
such as env.num_threads=1. Of several tasks (env=multitask) there are as many episodes each, or all
of one with env.only=<task>. A policy folder is evaluated in env=<name>, which is then needed.

Policies that are flows or diffusion models can be guided without training anew:
  guidance.weight=0.04        follow the critic's gradient; several weights, 0,0.02,0.04, are tried
                              on other episodes, and the best one is evaluated
  guidance.best_of=4          of so many samples take the critic's favourite
  guidance.estimator=denoised where the gradient is taken (see genpol.policies.guidance)
  guidance.critic=<run>       ask another run's critic, for a cloned policy that has none
  agent.goal_weight=2         exaggerate the goal of a clone that was told one (classifier-free)

The actions of any policy can be corrected towards a data set, on which agent=cdsa was trained:
  corrector=cdsa:<run>        with a step that is chosen on held-out trajectories of that run's
                              data, and by the critic of a policy that was learned from data
  corrector.action_weight=0.25 corrector.state_weight=0.1
                              with this step; 0 and 0 for none, as corrector=none
  corrector.noise_level=0.1 corrector.steps=1 corrector.max_norm=0.2 corrector.form=delta
                              see genpol.policies.correction

examples:
  genpol eval runs/HopperStand/gorl/20261122-101500-s0
  genpol eval runs/HopperStand/gorl/20261122-101500-s0 episodes=500 video=hopper.mp4
  genpol eval policies/hopper env=Hopper-v5
"""

_OWN = {"episodes": 100, "seed": 20_000, "stochastic": False, "video": "", "json": False}


def run(arguments: list[str]) -> int:
    """Evaluate one checkpoint and print the outcome."""
    if not arguments or "=" in arguments[0]:
        raise ConfigError("no run given; write: genpol eval <run folder>")
    path = Path(arguments[0])
    options, guided, corrected, overrides = _divide(arguments[1:])

    from genpol.cli import correction, guidance
    from genpol.cli.runs import load_run
    from genpol.cli.train import record_video
    from genpol.seeding import derive
    from genpol.training.evaluation import evaluate

    request = guidance.parse(guided)
    wanted = correction.parse(options["corrector"], corrected)
    trained = load_run(path, overrides)
    agent, make_env = trained.agent, trained.make_env
    critic = None
    if request is not None and request.critic is not None:
        critic = load_run(request.critic).agent
    episodes, seed = trained.settings.shared_out(options["episodes"]), options["seed"]
    together = trained.settings.evaluation_envs(episodes)
    env = make_env(num_envs=together, seed=derive(seed, "test"))

    def run_episodes(role: str) -> Evaluation:
        seed_of_role = derive(seed, role)
        agent.generator.manual_seed(seed_of_role)
        return evaluate(
            agent.policy,
            env,
            episodes=episodes,
            seed=seed_of_role,
            deterministic=not options["stochastic"],
        )

    def run_with(weight: float | None) -> Evaluation:
        assert request is not None
        guidance.guide(agent, request, weight, critic)
        return run_episodes("choice of weight")

    chosen: dict[str, Any] = {}
    try:
        if request is not None:
            weight, tried = guidance.choose(request, run_with)
            used = guidance.guide(agent, request, weight, critic)
            chosen = {"guidance_tried": tried} if tried else {}
            chosen |= {f"guidance_{k}": v for k, v in asdict(used).items()}
        policy = None
        if wanted is not None:
            seed_of_choice = derive(seed, "choice of correction")
            policy, how = correction.apply(
                trained, wanted, seed=seed_of_choice, deterministic=not options["stochastic"]
            )
            chosen |= how
        result = run_episodes("test")
        chosen |= {} if policy is None else correction.outcome(policy)
    finally:
        env.close()
    _print(
        {"checkpoint": str(trained.checkpoint), **chosen, **_statistics(result)},
        as_json=options["json"],
    )
    if options["video"]:  # last, so that the numbers are out if it cannot be written
        record_video(agent, make_env, Path(options["video"]), derive(seed, "test"))
    return 0


def _divide(
    arguments: Sequence[str],
) -> tuple[dict[str, Any], dict[str, str], dict[str, str], list[str]]:
    """Return the command's own options, those of guidance and of correction, and the rest."""
    options: dict[str, Any] = {**_OWN, "corrector": None}
    apart: dict[str, dict[str, str]] = {"guidance": {}, "corrector": {}}
    overrides: list[str] = []
    for text in arguments:
        key, equals, value = text.partition("=")
        group, dot, name = key.partition(".")
        if equals and dot and group in apart:
            apart[group][name] = value
        elif equals and key in options:
            options[key] = value if key == "corrector" else _parse(key, value)
        else:
            overrides.append(text)
    return options, apart["guidance"], apart["corrector"], overrides


def _statistics(result: Evaluation) -> dict[str, Any]:
    """Return the summary of an evaluation, values at risk, 95 % intervals and every return."""
    import numpy as np

    from genpol.report import risk

    summary: dict[str, Any] = result.summary()
    if len(result.successes) > 0:
        from scipy.stats import binomtest

        solved = binomtest(int(result.successes.sum()), len(result.successes))
        interval = solved.proportion_ci(method="wilson")
        summary |= {"success_low": float(interval.low), "success_high": float(interval.high)}
    returns = result.returns.double().cpu().numpy()
    if len(returns) > 0 and np.isfinite(returns).all():
        summary |= _estimate("return", returns, risk.mean())
        for level in (0.05, 0.25):
            name = f"value_at_risk_{level:.0%}"
            summary[name] = risk.value_at_risk(returns, level)
            summary |= _estimate(name, returns, risk.var(level))
            summary[f"conditional_{name}"] = risk.conditional_value_at_risk(returns, level)
            summary |= _estimate(f"conditional_{name}", returns, risk.cvar(level))
            note = risk.few(len(returns), level)
            summary |= {f"{name}_note": note} if note else {}
    return {**summary, "returns": returns.tolist()}


def _estimate(name: str, returns: np.ndarray, measure: Measure) -> dict[str, float]:
    """Return the ends of a measure's interval, under ``name``; one episode has none."""
    from genpol.report import risk

    if len(returns) < 2:
        return {}
    found = risk.estimate(returns, measure)
    return {f"{name}_low": found.low, f"{name}_high": found.high}


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
        sys.stdout.write(json.dumps(_without_nan(summary)) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    sys.stdout.write(f"{summary.pop('checkpoint')}\n")
    summary.pop("returns", None)
    for row in summary.pop("guidance_tried", ()):
        tried = row.get("success_mean", row["return_mean"])
        sys.stdout.write(f"weight {row['weight']:g}: {tried:.4g} over {row['episodes']} episodes\n")
    from genpol.cli import correction

    for line in correction.lines(summary):
        sys.stdout.write(f"{line}\n")
    table = Table(show_header=False)
    for name, value in summary.items():
        shown = f"{value:.{_decimals(name)}f}" if isinstance(value, float) else str(value)
        table.add_row(name.replace("_", " "), shown)
    Console().print(table)


def _without_nan(value: Any) -> Any:
    """Return ``value`` with ``None`` for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_without_nan(x) for x in value]
    return None if value != value else value


def _decimals(name: str) -> int:
    return 3 if name.startswith(("success", "guidance", "corrector")) else 1
