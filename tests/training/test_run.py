"""The run folder: its files, its tables, and coming back to it."""

from __future__ import annotations

import csv
import errno
import json
import sys
import types
from datetime import datetime

import pytest
import torch

from genpol.errors import GenpolError, MissingExtraError
from genpol.training import run as run_module
from genpol.training.run import EVALUATION_COLUMNS, PROGRESS_COLUMNS, Run

CONFIG = {"agent": {"learning_rate": 1e-5, "name": "1e-3", "layers": [3, 2]}, "seed": None}
EVALUATION = dict.fromkeys(EVALUATION_COLUMNS, 1.0) | {"episodes": 10}


@pytest.fixture
def run(tmp_path):
    return create(tmp_path)


def create(root, config=CONFIG, **options):
    command = ["genpol", "train", "x=a b"]
    options = {"tensorboard": False, **options}
    return Run.create(root, "HopperStand", "gorl", 3, config, command, **options)


def reopen(run):
    return Run.open(run.path, tensorboard=False)


def rows(run, name="metrics.csv"):
    with (run.path / name).open(newline="") as file:
        return list(csv.DictReader(file))


def header(run, name="metrics.csv"):
    return (run.path / name).read_text().splitlines()[0].split(",")


# --- the folder --------------------------------------------------------------------------------


def test_folder_is_named_by_env_agent_time_and_seed(tmp_path, run):
    env, agent, name = run.path.relative_to(tmp_path).parts
    assert (env, agent) == ("HopperStand", "gorl")
    datetime.strptime(name, "%Y%m%d-%H%M%S-s3")


def test_a_taken_name_gets_a_number(tmp_path, monkeypatch):
    class Frozen(datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(run_module, "datetime", Frozen)
    names = [create(tmp_path).path.name for _ in range(3)]
    assert names == [f"20260102-030405-s3{suffix}" for suffix in ("", "-2", "-3")]


def test_names_with_separators_stay_one_folder(tmp_path):
    run = Run.create(tmp_path, "ALE/Pong-v5", "../gorl", 0, {}, [], tensorboard=False)
    assert run.path.parent.relative_to(tmp_path).parts == ("ALE-Pong-v5", "gorl")


def test_configuration_comes_back(run):
    assert reopen(run).config == CONFIG


def test_record_says_what_ran_where(run):
    record = json.loads((run.path / "run.json").read_text())
    assert record["status"] == "running"
    assert record["command"] == "genpol train 'x=a b'"
    assert record["seed"] == 3
    assert record["versions"]["torch"] == torch.__version__
    assert record["machine"]["cores"] >= 1
    assert datetime.fromisoformat(record["started"]).tzinfo is not None


def test_a_package_that_is_absent_has_no_version(tmp_path, monkeypatch):
    def absent(package):
        raise run_module.importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(run_module.importlib.metadata, "version", absent)
    assert create(tmp_path).record["versions"]["mujoco"] is None


def test_finish_records_status_and_elapsed_time(run):
    run.finish("interrupted")
    record = reopen(run).record
    assert record["status"] == "interrupted"
    assert record["elapsed_s"] > 0


def test_resume_marks_it_running_again_and_adds_up_the_time(run):
    run.finish("interrupted")
    run.record["elapsed_s"] = 1000.0
    (run.path / "run.json").write_text(json.dumps(run.record))
    resumed = reopen(run)
    resumed.resume(["genpol", "train", "resume=x"])
    assert resumed.record["status"] == "running"
    assert resumed.record["resumed"][0]["command"] == "genpol train resume=x"
    resumed.finish("finished")
    assert 1000 < resumed.record["elapsed_s"] < 1100


def test_opening_changes_nothing(run):
    run.log_metrics(1, 1, 1.0, {"loss": 1.0})
    before = {path: path.stat().st_mtime_ns for path in [run.path, *run.path.iterdir()]}
    Run.open(run.path)
    assert {path: path.stat().st_mtime_ns for path in [run.path, *run.path.iterdir()]} == before


def test_what_is_no_run_folder_is_refused(tmp_path):
    with pytest.raises(GenpolError, match="give a run folder"):
        Run.open(tmp_path)


# --- tables ------------------------------------------------------------------------------------


def test_metrics_are_exact_and_take_tensors(run):
    run.log_metrics(64, 2, 0.5, {"loss/actor": torch.tensor(0.25), "policy/kl": 0.1})
    expected = ["64", "2", "0.5", "0.25", "0.1"]
    assert header(run) == [*PROGRESS_COLUMNS, "loss/actor", "policy/kl"]
    assert list(rows(run)[0].values()) == expected


def test_a_row_is_in_the_file_at_once(run):
    for count in range(1, 4):
        run.log_metrics(count, 0, 0.0, {"loss": 1.0})
        assert len(rows(run)) == count


def test_a_new_name_becomes_a_column_and_old_rows_leave_it_empty(run):
    run.log_metrics(1, 0, 0.0, {"a": 1.0})
    run.log_metrics(2, 0, 0.0, {"b": 2.0})
    assert [(row["a"], row["b"]) for row in rows(run)] == [("1.0", ""), ("", "2.0")]


def test_names_with_commas_and_quotes_survive(run):
    run.log_metrics(1, 0, 0.0, {'a,"b"': 1.0})
    run.log_metrics(2, 0, 0.0, {"c": 2.0})
    assert rows(run)[0]['a,"b"'] == "1.0"


def test_evaluations_have_the_agreed_columns(run):
    run.log_evaluation(100, 5, 1.0, EVALUATION)
    assert header(run, "evals.csv") == [
        *("env_steps", "agent_steps", "gradient_steps", "wall_clock_s"),
        *EVALUATION_COLUMNS,
    ]
    assert rows(run, "evals.csv")[0]["episodes"] == "10"


def test_agent_steps_are_those_of_actions_that_are_held(tmp_path):
    held = create(tmp_path, config={"env": {"action_repeat": 8}})
    held.log_evaluation(400, 5, 1.0, EVALUATION)
    assert rows(held, "evals.csv")[0]["agent_steps"] == "50"
    plain = create(tmp_path, config={"env": {"id": "Pendulum-v1"}})
    plain.log_evaluation(400, 5, 1.0, EVALUATION)
    assert rows(plain, "evals.csv")[0]["agent_steps"] == "400"


def test_a_table_from_before_agent_steps_gets_them_when_the_run_goes_on(tmp_path):
    run = create(tmp_path, config={"env": {"action_repeat": 2}})
    old = "env_steps,gradient_steps,wall_clock_s," + ",".join(EVALUATION_COLUMNS)
    numbers = ",".join("7" for _ in EVALUATION_COLUMNS)
    (run.path / "evals.csv").write_text(f"{old}\n0,0,0.1,{numbers}\n100,9,1.5,{numbers}\n")
    resumed = reopen(run)
    resumed.check_tables()
    resumed.truncate_to(100)
    resumed.log_evaluation(200, 10, 2.0, EVALUATION)
    found = rows(run, "evals.csv")
    assert [row["agent_steps"] for row in found] == ["0", "50", "100"]
    assert [row["gradient_steps"] for row in found] == ["0", "9", "10"]
    assert header(run, "evals.csv")[:2] == ["env_steps", "agent_steps"]
    assert found[1]["return_mean"] == "7"


def test_an_evaluation_may_say_more_but_not_less(run):
    run.log_evaluation(100, 5, 1.0, EVALUATION | {"success_rate": 0.5})
    assert header(run, "evals.csv")[-1] == "success_rate"
    with pytest.raises(ValueError, match="lacks diverged"):
        run.log_evaluation(100, 5, 1.0, {k: 1 for k in EVALUATION if k != "diverged"})


def test_resuming_drops_the_rows_beyond_the_checkpoint_and_goes_on(run):
    for steps in (10, 20, 30):
        run.log_metrics(steps, steps, 0.0, {"loss": 1.0, "late": 2.0})
        run.log_evaluation(steps, steps, 0.0, EVALUATION)
    resumed = reopen(run)
    resumed.truncate_to(20)
    resumed.log_metrics(25, 25, 0.0, {"new": 1.0})
    assert [row["env_steps"] for row in rows(run)] == ["10", "20", "25"]
    assert [row["env_steps"] for row in rows(run, "evals.csv")] == ["10", "20"]
    assert header(run)[3:] == ["loss", "late", "new"]


def test_an_evaluation_that_the_checkpoint_lacks_is_dropped(run):
    for steps in (10, 20):
        run.log_metrics(steps, steps, 0.0, {"loss": 1.0})
        run.log_evaluation(steps, steps, 0.0, EVALUATION)
    run.truncate_to(20, evaluated=(10, 10**9))
    assert [row["env_steps"] for row in rows(run)] == ["10", "20"]
    assert [row["env_steps"] for row in rows(run, "evals.csv")] == ["10"]


def test_offline_rows_are_dropped_by_gradient_steps(run):
    for steps in (10, 20, 30):
        run.log_metrics(0, steps, 0.0, {"loss": 1.0})
    run.truncate_to(0, gradient_steps=20)
    assert [row["gradient_steps"] for row in rows(run)] == ["10", "20"]


def test_truncating_what_was_never_written_does_nothing(run):
    run.truncate_to(0)
    assert not (run.path / "metrics.csv").exists()


@pytest.mark.parametrize("torn", ["30,1,2.0,0.", "30", "\0\0\0\n", "30,1\n"])
def test_a_torn_last_line_is_dropped(run, torn):
    run.log_metrics(10, 1, 0.0, {"loss": 1.0})
    with (run.path / "metrics.csv").open("a") as file:
        file.write(torn)
    resumed = reopen(run)
    resumed.log_metrics(40, 1, 0.0, {"loss": 1.0})
    assert [row["env_steps"] for row in rows(run)] == ["10", "40"]


def test_a_rewrite_that_fails_leaves_the_table_as_it_was(run, monkeypatch):
    run.log_metrics(10, 1, 0.0, {"loss": 1.0})
    before = (run.path / "metrics.csv").read_text()

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_module.Path, "replace", full)
    with pytest.raises(GenpolError, match=r"metrics\.csv: cannot be written \(No space left"):
        run.log_metrics(20, 1, 0.0, {"new": 1.0})
    assert (run.path / "metrics.csv").read_text() == before


# --- other places to log to --------------------------------------------------------------------


def events(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run.path / "tensorboard"))
    accumulator.Reload()
    names = accumulator.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in accumulator.Scalars(name)] for name in names}


def test_tensorboard_shows_metrics_and_evaluations_and_forgets_what_was_dropped(
    tmp_path, monkeypatch
):
    # TensorBoard reads files in the order of their names, which end in a count of this process's
    # writers: the tenth would come before the ninth.
    from tensorboard.summary.writer import event_file_writer

    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    run = create(tmp_path, tensorboard=True)
    assert not (run.path / "tensorboard").exists()
    for steps in (10, 20, 30):
        run.log_metrics(steps, 0, 0.0, {"loss": float(steps)})
    run.log_evaluation(30, 0, 0.0, EVALUATION)
    run.finish("interrupted")
    assert events(run)["loss"] == [(10, 10.0), (20, 20.0), (30, 30.0)]
    assert events(run)["evaluation/episodes"] == [(30, 10.0)]
    resumed = Run.open(run.path)
    resumed.truncate_to(20)
    resumed.log_metrics(30, 0, 0.0, {"loss": -1.0})
    resumed.finish("finished")
    assert events(run)["loss"] == [(10, 10.0), (20, 20.0), (30, -1.0)]


def test_wandb_is_asked_for_only_by_those_who_want_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    create(tmp_path)
    with pytest.raises(MissingExtraError, match=r"genpol\[wandb\]"):
        create(tmp_path / "other", wandb_project="p")
    assert not (tmp_path / "other").exists()


def test_wandb_gets_configuration_and_numbers(tmp_path, monkeypatch):
    calls = []
    online = types.SimpleNamespace(
        log=lambda numbers: calls.append(("log", numbers)),
        define_metric=lambda *_args, **_options: None,
        finish=lambda: calls.append(("finish", None)),
    )
    fake = types.ModuleType("wandb")
    fake.init = lambda **options: calls.append(("init", options)) or online
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run = create(tmp_path, wandb_project="p")
    run.log_metrics(10, 1, 0.0, {"loss": 1.0})
    run.finish("finished")
    assert [name for name, _ in calls] == ["init", "log", "finish"]
    assert (calls[0][1]["project"], calls[0][1]["config"]) == ("p", CONFIG)
    assert calls[1][1] == {"loss": 1.0, "env_steps": 10}
