"""What `init=` names: a run, a policy folder, one that ships with genpol, or one on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol.cli.list import package_folder
from genpol.cli.runs import TrainedRun, load_run
from genpol.cli.start import Start, environment_of
from genpol.errors import ConfigError, GenpolError, nearest

if TYPE_CHECKING:
    from genpol.pretrained import PretrainedPolicy

_HUB = "hf://"


def find(text: str, agent: str) -> Start:
    """Find what is to be the beginning of a run of ``agent``.

    Raises:
        ConfigError: If there is no such thing, or the agent cannot begin from it.
        CheckpointError: If it is damaged.
    """
    from genpol.agents import agent_class, holders
    from genpol.pretrained import PolicyHolder
    from genpol.training import checkpoint
    from genpol.training.policy_folder import is_policy_folder, read

    folder = locate(text)
    holds = issubclass(agent_class(agent), PolicyHolder)
    if is_policy_folder(folder):
        if not holds:
            raise ConfigError(
                f"init = {text!r}: is a policy folder, with which agent={agent} cannot begin; "
                f"{', '.join(holders())} can"
            )
        return Start(text, agent, policy=read(folder))
    found = checkpoint.resolve(folder)
    trained = checkpoint.read_metadata(found).get("agent")
    if trained == agent or not holds:
        return Start(text, agent, checkpoint=found)
    return Start(text, agent, policy=of_run(folder))


def locate(text: str) -> Path:
    """Return the folder that a path, the name of a policy that ships, or ``hf://`` names.

    Raises:
        ConfigError: If there is none.
    """
    if text.startswith(_HUB):
        return download(text)
    path = Path(text).expanduser()
    if path.exists():
        return path
    shipped = shipped_policies()
    if text in shipped:
        return shipped[text]
    beside = [x.name for x in path.parent.iterdir()] if path.parent.is_dir() else []
    raise ConfigError(
        f"init = {text!r}: no such run or policy.{nearest(path.name, [*beside, *shipped])} "
        "`genpol policies list` shows those that come with genpol"
    )


def shipped_policies() -> dict[str, Path]:
    """Return the policies that come with genpol, by name."""
    folder = package_folder("genpol.assets") / "policies"
    found = sorted(folder.glob("*/policy.json"))
    return {path.parent.name: path.parent for path in found}


def download(text: str) -> Path:
    """Fetch ``hf://owner/name``, or ``hf://owner/name@revision``, from the Hugging Face hub.

    What is in its cache already is not fetched again.

    Raises:
        GenpolError: If the hub cannot be reached or has no such policy.
    """
    repository, revision = parse_hub(text)
    import huggingface_hub as hub

    from genpol.training.policy_folder import CARD, RECORD, WEIGHTS

    try:
        return Path(
            hub.snapshot_download(
                repository, revision=revision, allow_patterns=[WEIGHTS, RECORD, CARD]
            )
        )
    except Exception as error:
        raise hub_error(text, error) from None


def parse_hub(text: str) -> tuple[str, str | None]:
    """Return repository and revision of ``hf://owner/name[@revision]``.

    Raises:
        ConfigError: If it is written otherwise.
    """
    repository, _, revision = text.removeprefix(_HUB).partition("@")
    if not text.startswith(_HUB) or repository.count("/") != 1 or "" in repository.split("/"):
        raise ConfigError(f"{text!r}: write hf://owner/name, or hf://owner/name@revision")
    return repository, revision or None


def hub_error(text: str, error: Exception) -> GenpolError:
    """Tell in one line what the hub's client said at length."""
    reason = str(error).strip().splitlines()[0].removesuffix(".")[:200]
    return GenpolError(
        f"{text}: the Hugging Face hub did not answer as hoped ({type(error).__name__}: {reason}); "
        "if this machine is offline, copy the policy's folder here and name that"
    )


def of_run(path: Path) -> PretrainedPolicy:
    """Return the model of behaviour of a trained run.

    Raises:
        ConfigError: If it has none.
        CheckpointError: If there is no such run, or it is damaged.
    """
    from genpol.pretrained import PolicyHolder, PretrainedPolicy, model_of

    trained = load_run(path)
    agent, settings = trained.agent, trained.settings
    if not isinstance(agent, PolicyHolder):
        raise ConfigError(
            f"{path}: agent={settings.choices.agent} has no flow or diffusion model of its own "
            "from which another could begin; take a run of bc"
        )
    from genpol.envs import label

    specs, period_s = environment_of(settings)
    weights, statistics = agent.give_policy()
    past_steps = getattr(settings.agent, "past_steps", 0)
    return PretrainedPolicy(
        model=model_of(settings.agent, statistics is not None),
        weights=weights,
        statistics=statistics,
        observation_dim=specs.observation_dim,
        action_dim=specs.action_dim,
        action_steps=settings.agent.action_steps or settings.agent.horizon - past_steps,
        env=label(settings.env),
        action_repeat=specs.action_repeat,
        control_period_s=period_s,
        data=_learned_from(trained),
        success=_measured(trained),
        observation_steps=settings.env.observation_steps,
        **agent.give_bounds(),
    )


def _learned_from(trained: TrainedRun) -> dict[str, Any]:
    settings = trained.settings
    facts: dict[str, Any] = {"agent": settings.choices.agent}
    facts |= {"name": Path(settings.data).name} if settings.data else {}
    from genpol.training import checkpoint

    return facts | {"updates": checkpoint.read_metadata(trained.checkpoint)["gradient_steps"]}


def _measured(trained: TrainedRun) -> dict[str, Any]:
    """Return the last evaluation up to the checkpoint."""
    import pandas as pd

    from genpol.training import checkpoint

    table = checkpoint.run_folder(trained.checkpoint) / "evals.csv"
    evaluations = pd.read_csv(table) if table.is_file() else pd.DataFrame()
    if evaluations.empty:
        return {}
    at = checkpoint.read_metadata(trained.checkpoint)
    seen = evaluations[evaluations.gradient_steps <= at["gradient_steps"]]
    if seen.empty:
        return {}
    last = seen.iloc[-1]
    columns = [name for name in ("success_mean", "return_mean") if name in last]
    facts: dict[str, Any] = {name: float(last[name]) for name in columns}
    return facts | {"episodes": int(last.episodes), "seed": trained.settings.seed}
