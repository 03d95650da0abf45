from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from genpol.cli import bench, bench_fql
from genpol.cli.configuration import compose, to_settings
from genpol.errors import ConfigError
from genpol.report import fql_yardsticks, results
from genpol.report.fql_yardsticks import Draws, OneFileFQL

NETS = ("agent.actor.hidden=[8,8]", "agent.critic.hidden=[8,8]", "agent.batch_size=16")
TINY = ("env=HopperStand", "recipe=none", "agent.solver_steps=3", *NETS)


@pytest.fixture(params=["gelu", "gelu_tanh"])
def settings(request: pytest.FixtureRequest) -> Any:
    kind = [f"agent.{net}.activation={request.param}" for net in ("actor", "critic")]
    return to_settings(compose(bench.complete([*TINY, "agent.alpha=3.0", *kind], "fql")))


def own_agent(settings: Any, other: OneFileFQL) -> Any:
    """Return the library's FQL with the weights of the plain loop."""
    agent = bench_fql._agent(settings, compile=False)

    def linears(net: torch.nn.Module) -> list[torch.nn.Linear]:
        return [x for x in net.modules() if isinstance(x, torch.nn.Linear)]

    with torch.no_grad():
        for net, source in ((agent.flow.net, other.flow), (agent.actor.net, other.policy)):
            for mine, theirs in zip(linears(net), linears(source), strict=True):
                mine.weight.copy_(theirs.weight)
                mine.bias.copy_(theirs.bias)
        for ensemble, critics in (
            (agent.critic.net, other.critics),
            (agent.averaged.net, other.target_critics),
        ):
            for member, critic in enumerate(critics):
                for layer, theirs in enumerate(linears(critic)):
                    ensemble.weights[layer][member].copy_(theirs.weight.T)
                    ensemble.biases[layer][member].copy_(theirs.bias)
    return agent


def one_file(settings: Any) -> tuple[OneFileFQL, Any, Draws]:
    """Return the plain loop, its averaged critics unlike the live ones, data and noise."""
    specs = bench_fql._agent(settings).specs
    work = bench_fql._workload(settings, specs)
    torch.manual_seed(1)
    other = OneFileFQL(work)
    with torch.no_grad():
        for parameter in other.target_critics.parameters():
            parameter.mul_(0.5)
    rows = bench_fql._noise(work)
    return other, rows, other.draw(work.batch_size)


def test_the_plain_loop_has_the_librarys_losses_and_gradients(settings: Any) -> None:
    other, rows, draws = one_file(settings)
    size = settings.agent.batch_size
    theirs = other.loss({name: torch.from_numpy(x[:size]) for name, x in rows.items()}, draws)
    agent = own_agent(settings, other)
    batch = bench_fql._batch(settings, rows)
    own = {"next": draws.next_action, "imitation": draws.flow, "policy": draws.policy}
    own = {name: x.unsqueeze(1) for name, x in own.items()} | {"time": draws.time}
    mine, _ = agent.loss(batch, own)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    mine.backward()
    theirs.backward()

    def norms(module: torch.nn.Module) -> float:
        found = [x.grad.square().sum() for x in module.parameters() if x.grad is not None]
        return float(torch.stack(found).sum().sqrt())

    for net, source in (
        (agent.flow.net, other.flow),
        (agent.actor, other.policy),
        (agent.critic, other.critics),
    ):
        assert norms(net) == pytest.approx(norms(source), rel=1e-4)
        assert norms(net) > 0


def test_jax_has_the_losses_and_gradients_of_the_plain_loop(settings: Any) -> None:
    jax = pytest.importorskip("jax")
    other, rows, draws = one_file(settings)
    size = settings.agent.batch_size
    batch = {name: x[:size] for name, x in rows.items()}
    parameters = fql_yardsticks.to_jax(other)
    target = fql_yardsticks.to_jax(other, other.target_critics)["critics"]
    noise = Draws(*(x.numpy() for x in draws))
    loss, slopes = jax.value_and_grad(
        lambda x: fql_yardsticks.jax_loss(other.work, x, target, batch, noise)
    )(parameters)
    theirs = other.loss({name: torch.from_numpy(x) for name, x in batch.items()}, draws)
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-4)
    theirs.backward()
    for name, net in (("flow", other.flow), ("policy", other.policy)):
        first = next(x for x in net.modules() if isinstance(x, torch.nn.Linear))
        np.testing.assert_allclose(slopes[name][0][0], first.weight.grad.T, rtol=2e-3, atol=1e-5)
    last = [x for x in other.critics[1].modules() if isinstance(x, torch.nn.Linear)][-1]
    found = slopes["critics"][-1][0][1]
    np.testing.assert_allclose(found, last.weight.grad.T, rtol=2e-3, atol=1e-5)


def test_updates_are_measured_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = "genpol-update,torch-update,genpol-train,torch-train"
    speed = ("seconds=0.01", "rounds=1", "--only", keys, "--save", "--results", str(tmp_path))
    assert bench.run(["--learning", "agent=fql", *TINY, *speed]) == 0
    out = capsys.readouterr().out
    assert "update / plain torch: " in out
    assert "with batches from data / plain torch: " in out
    frame = results.read(tmp_path / "bench-fql-HopperStand.csv")
    measured = frame[frame["metric"].str.startswith("updates_per_s/")]
    assert len(measured) == 4
    assert (measured["gradient_steps"] >= 1).all()
    assert (measured["env_steps"] == 0).all()


def test_without_jax_its_contenders_are_skipped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jax", None)
    speed = ("seconds=0.01", "rounds=1", "--only", "torch-update,jax-update")
    assert bench.run(["--learning", "agent=fql", *TINY, *speed]) == 0
    out = capsys.readouterr().out
    assert "skipped" in out
    assert "JAX is not installed" in out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("agent.horizon=2", r"agent\.horizon = 2"),
        ("agent.critic.layer_norm=none", r"agent\.critic\.layer_norm = 'none'"),
        ("device=cuda", "must be cpu"),
    ],
)
def test_what_cannot_be_compared_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        bench.run(["--learning", "agent=fql", *TINY, override])


def test_the_cost_of_guidance_is_measured_beside_best_of_n(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--learning", "agent=qgf", *TINY, "num_envs=2", "seconds=0.01", "rounds=1"]
    assert bench.run(arguments) == 0
    out = capsys.readouterr().out
    assert "guided / best of 4: " in out
    assert "qgf-best-of-4" in out
