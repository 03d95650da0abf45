"""What the ranks of test_ranks do; run by torchrun, with a folder for its runs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from genpol.cli.main import prepare_process

prepare_process(os.environ)

# ruff: noqa: E402
import torch

from genpol import parallel
from genpol.cli import train
from genpol.errors import GenpolError
from genpol.nn.optimizer import GuardedOptimizer
from genpol.objectives.advantages import normalize_advantage

SETTINGS = [
    *("env=Reacher-v5", "num_envs=4", "num_threads=1", "env.num_threads=1"),
    *("evaluation.episodes=2", "tensorboard=false", "video=false"),
    *("agent=ppo", "agent.rollout_steps=25", "agent.minibatches=1", "agent.noise_correlation=0.5"),
]


def steps_with_a_nan() -> dict[str, Any]:
    """Return how often all ranks skipped where one had a NaN, and where the weight then stands."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = GuardedOptimizer([weight], 0.1, max_grad_norm=1.0, eps=1e-8)
    for bad in (False, True, False):
        factor = float("nan") if bad and parallel.rank() == 1 else 1.0
        optimizer.step((weight * factor).sum())
    return {"skipped": optimizer.skipped, "weight": float(weight.detach())}


def run(*arguments: str) -> str:
    """Train and return the end of it: an error's text, or the exit code."""
    try:
        ended = str(train._run([*arguments]))
    except GenpolError as error:
        ended = str(error)
    parallel.gather(ended)  # wait for the one that writes
    return ended


def main(folder: Path) -> None:
    """Do everything, and write what came of it on every rank."""
    result: dict[str, Any] = {"nan": steps_with_a_nan()}
    share = torch.arange(6.0)[parallel.rank() * 2 :][: 2 + 2 * parallel.rank()]  # 2 rows and 4
    result["normalized"] = normalize_advantage(share).tolist()
    result["whole"] = run(*SETTINGS, "total_steps=400", f"output={folder / 'whole'}")
    result["half"] = run(*SETTINGS, "total_steps=200", f"output={folder / 'half'}")
    half = next((folder / "half").glob("*/*/*"))
    result["resumed"] = run(f"resume={half}", "total_steps=400")
    rest = [text for text in SETTINGS if not text.startswith("agent")]
    output = f"output={folder / 'refused'}"
    result["sac"] = run(*rest, "agent=sac", "total_steps=400", output)
    result["capo"] = run(*SETTINGS, "agent.capo.enabled=true", output)
    result["collectors"] = run(*SETTINGS, "num_collectors=2", output)
    alone = [text for text in SETTINGS if not text.startswith("num_envs")]
    result["odd"] = run(*alone, "num_envs=3", output)
    results = parallel.gather(result)
    if parallel.is_first():
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    with parallel.join():
        main(Path(sys.argv[1]))
