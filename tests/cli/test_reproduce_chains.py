"""Runs that begin from other runs, with a trainer of thirty lines in place of the real one."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from genpol.cli import reproduce_session
from genpol.report import results

if TYPE_CHECKING:
    from tests.cli.conftest import Scene

# In the file a run may stand before the one that it begins from.
RUNS = """
  gorl: [agent=gorl, "init={base}"]
  base: [agent=base]
  ppo: [agent=ppo, total_steps=2]
"""
ONE = ("--seeds", "0")


@pytest.fixture
def chain(scene: Scene) -> Scene:
    """Let the runs of one agent begin from those of another."""
    head = scene.yaml.read_text().partition("runs:\n")[0]
    scene.yaml.write_text(head + "runs:" + RUNS)
    return scene


def agents(scene: Scene) -> list[str]:
    """Return whose trainings began, and which were resumed."""
    return [
        call[0] if call[0] == "resume" else next(x[6:] for x in call if x.startswith("agent="))
        for call in scene.calls
    ]


@pytest.mark.parametrize("jobs", ["1", "2", "5"])
def test_a_run_begins_from_the_folder_of_the_one_it_names(chain: Scene, jobs: str) -> None:
    assert chain.run("--jobs", jobs) == 0
    assert sorted(agents(chain)) == sorted(["base", "gorl", "ppo"] * 2)
    began = [x for call in chain.calls for x in call if x.startswith("init=")]
    for seed in (0, 1):
        (folder,) = (Path(x[5:]) for x in began if f"-s{seed}/" in x)
        assert folder.is_relative_to(chain.folder / f"runs/demo/base-HopperStand-s{seed}")
        assert (folder / "run.json").exists()
    assert chain.recorded("gorl")[0][2] == (
        "genpol train env=HopperStand total_steps=3 agent=base seed=0 "
        "output=repeat/base-HopperStand-s0 && genpol train env=HopperStand total_steps=3 "
        'agent=gorl init="$(echo repeat/base-HopperStand-s0/*/*/*)" seed=0 '
        "output=repeat/gorl-HopperStand-s0"
    )
    assert chain.run("--jobs", jobs) == 0
    assert chain.calls == []


def test_a_run_that_waits_does_not_keep_others_waiting(
    chain: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two jobs, one of which trains the base, the other one takes what waits for nothing."""
    other = threading.Event()
    begin = reproduce_session.Session._run

    def run(self: reproduce_session.Session, item: reproduce_session.Run) -> str:
        if item.label == "base":
            assert other.wait(20)
        if item.label == "ppo":
            other.set()
        return begin(self, item)

    monkeypatch.setattr(reproduce_session.Session, "_run", run)
    assert chain.run(*ONE, "--jobs", "2") == 0
    assert sorted(agents(chain)[:2]) == ["base", "ppo"]
    assert agents(chain)[2:] == ["gorl"]


@pytest.mark.parametrize("jobs", ["1", "3"])
@pytest.mark.parametrize("options", [(), ("--continue",)])
def test_what_a_failed_run_was_to_begin_is_not_begun(
    chain: Scene, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], jobs: str
) -> None:
    asked = (*ONE, "--only", "gorl", *options, "--jobs", jobs)
    assert chain.run(*asked, trainer="crash") == 1
    assert agents(chain) == ["base"]
    told = capsys.readouterr().err
    assert "gorl-HopperStand-s0 is not begun: base-HopperStand-s0 did not finish\n" in told
    assert chain.run(*asked) == 0
    assert agents(chain) == ["resume", "gorl"]


def test_a_results_file_that_cannot_be_written_stops_all_of_them(
    chain: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_options: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr(results, "replace", full)
    with pytest.raises(OSError, match="no space"):
        chain.run(*ONE, "--only", "gorl", "--jobs", "3")
    assert agents(chain) == ["base"]


def test_a_label_keeps_what_it_needs_but_freshens_itself_alone(chain: Scene) -> None:
    assert chain.run(*ONE, "--only", "gorl") == 0
    assert agents(chain) == ["base", "gorl"]
    assert chain.run(*ONE, "--only", "gorl", "--fresh") == 0
    assert agents(chain) == ["gorl"]


def test_what_began_from_a_run_begins_anew_behind_a_fresh_one(chain: Scene) -> None:
    chain.add('  last: [agent=last, "init={gorl}"]\n')
    chain.run()
    before = chain.recorded("ppo")
    assert chain.run(*ONE, "--only", "base", "--fresh") == 0
    assert agents(chain) == ["base"]
    assert chain.recorded("gorl") == chain.recorded("last") == []
    assert len(chain.recorded("last", seed=1)) == 3
    assert chain.run() == 0
    assert agents(chain) == ["gorl", "last"]  # neither of them resumed
    assert chain.recorded("ppo") == before
    (newest,) = {x for call in chain.calls for x in call if x.startswith("init=") and "base" in x}
    assert newest[5:] == str(max(chain.folder.glob("runs/demo/base-HopperStand-s0/*/*/*")))


def test_a_changed_run_changes_what_begins_from_it(chain: Scene) -> None:
    chain.run(*ONE)
    chain.change("agent=base]", "agent=base, x=1]")
    assert chain.run(*ONE) == 0
    assert agents(chain) == ["base", "gorl"]


def test_a_run_cannot_begin_from_a_folder_that_is_gone(
    chain: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    chain.run(*ONE, "--only", "base")
    shutil.rmtree(chain.folder / "runs/demo/base-HopperStand-s0")
    assert chain.run(*ONE) == 1
    assert agents(chain) == []
    assert "`--fresh --only base` trains it anew" in capsys.readouterr().err


def test_a_dry_run_prints_an_order_that_works(
    chain: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chain.run(*ONE, "--dry-run") == 0
    runs = chain.folder / "runs/demo"
    assert capsys.readouterr().out.splitlines()[:2] == [
        "genpol train env=HopperStand total_steps=3 agent=base seed=0 "
        f"output={runs}/base-HopperStand-s0",
        "genpol train env=HopperStand total_steps=3 agent=gorl "
        f'init="$(echo {runs}/base-HopperStand-s0/*/*/*)" seed=0 '
        f"output={runs}/gorl-HopperStand-s0",
    ]


def test_an_interrupt_is_no_failure_of_what_waits(
    chain: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    with chain.interrupted_when(lambda: len(chain.recorded("base")) == 2):
        assert chain.run(*ONE, "--only", "gorl", trainer="wait") == 130
    assert agents(chain) == ["base"]
    assert "not begun" not in capsys.readouterr().err
    assert chain.run(*ONE, "--only", "gorl") == 0
    assert agents(chain) == ["resume", "gorl"]
