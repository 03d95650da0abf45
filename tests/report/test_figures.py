from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread

from genpol.errors import DatasetError
from genpol.report import figures


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Collect the figures that are saved."""
    saved: list[Figure] = []
    save = figures._save

    def keep(figure: Figure, path: Path) -> None:
        saved.append(figure)
        save(figure, path)

    monkeypatch.setattr(figures, "_save", keep)
    return saved


def results(agents: list[str], envs: list[str], seeds: int = 2) -> pd.DataFrame:
    rows = [
        {"agent": agent, "env": env, "seed": seed, "env_steps": step, "metric": "return"}
        | {"value": float(step + seed), "episodes": 10, "wall_clock_s": 1.0}
        for agent in agents
        for env in envs
        for seed in range(seeds)
        for step in (0, 1000, 2000)
    ]
    return pd.DataFrame(rows)


def evals(length: int = 5) -> pd.DataFrame:
    steps = np.arange(length) * 1000
    mean = np.linspace(0, 500, length)
    return pd.DataFrame(
        {
            "env_steps": steps,
            "wall_clock_s": steps / 10.0,
            "episodes": 10,
            "return_mean": mean,
            "return_std": 50.0,
            "return_min": mean - 60,
            "return_max": mean + 20,
        }
    )


def is_a_picture(path: Path) -> bool:
    pixels = imread(path)
    return min(pixels.shape[:2]) > 200 and pixels.std() > 0.01


def test_a_learning_curve_is_drawn_with_the_wall_clock_on_top(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    figures.learning_curve(evals(), tmp_path / "new" / "curve.png")
    assert is_a_picture(tmp_path / "new" / "curve.png")
    axes = drawn[0].axes[0]
    assert axes.get_xlabel() == "environment steps"
    assert axes.get_ylabel() == "return per episode"
    (top,) = axes.child_axes
    assert top.get_xlabel() == "wall clock (minutes)"
    # 400 s in all: minute 2 is at second 120, which is step 1200.
    labels = [text.get_text() for text in top.get_xticklabels()]
    assert labels == ["0", "2", "4", "6"]
    assert top.get_xticks()[1] == pytest.approx(1200)


def test_the_band_of_deviations_stays_within_the_range(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.learning_curve(evals(), tmp_path / "curve.png")
    extent = [band.get_paths()[0].get_extents() for band in drawn[0].axes[0].collections]
    assert extent[1].ymax <= extent[0].ymax


def test_a_single_evaluation_can_be_drawn_and_none_cannot(tmp_path: Path) -> None:
    figures.learning_curve(evals(1), tmp_path / "curve.png")
    assert is_a_picture(tmp_path / "curve.png")
    with pytest.raises(DatasetError, match="not been evaluated"):
        figures.learning_curve(evals(0), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_an_agent_has_one_colour_in_every_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    both = results(["gorl", "ppo"], ["WalkerWalk"])
    only_ppo = results(["ppo"], ["CheetahRun"])
    figures.experiment_curves(pd.concat([both, only_ppo]), tmp_path / "all.png", repetitions=20)
    assert is_a_picture(tmp_path / "all.png")
    walker, cheetah = drawn[0].axes
    assert [axes.get_title() for axes in (walker, cheetah)] == ["WalkerWalk", "CheetahRun"]
    colours = {line.get_label(): to_rgba(line.get_color()) for line in walker.lines}
    assert len(set(colours.values())) == 2
    assert to_rgba(cheetah.lines[0].get_color()) == colours["ppo (2 seeds)"]


def test_the_legend_names_each_agent_once(tmp_path: Path, drawn: list[Figure]) -> None:
    figures.experiment_curves(
        results(["gorl", "ppo"], ["a", "b", "c", "d"]), tmp_path / "all.png", repetitions=20
    )
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["gorl (2 seeds)", "ppo (2 seeds)"]


def test_benchmark_bars_are_sorted_by_median(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [
        {"env": "HopperStand", "metric": f"env_steps_per_s/{name}", "value": rate * factor}
        for name, rate in {"mj_step": 50.0, "genpol-env": 45.0, "envpool": 30.0}.items()
        for factor in (0.5, 1.0, 1.1)
    ]
    figures.bench_bars(pd.DataFrame(rows), tmp_path / "bench.png")
    assert is_a_picture(tmp_path / "bench.png")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][::-1] == [
        "mj_step",
        "genpol-env",
        "envpool",
    ]
    assert [bar.get_width() for bar in axes.patches] == [30.0, 45.0, 50.0]


def test_drawing_leaves_matplotlibs_settings_alone(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    figures.learning_curve(evals(), tmp_path / "curve.png")
    assert dict(matplotlib.rcParams) == before
