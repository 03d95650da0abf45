"""`genpol policies`: pretrained policies as folders to keep, share and begin from."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genpol.errors import ConfigError, nearest

if TYPE_CHECKING:
    from genpol.pretrained import PretrainedPolicy

SUMMARY = "list, show, pack, import or share pretrained policies"
USAGE = """
usage: genpol policies list [FOLDER]
       genpol policies show POLICY
       genpol policies pack RUN output=FOLDER
       genpol policies import --format FORMAT PATH output=FOLDER [OPTION=VALUE ...]
       genpol policies pull hf://OWNER/NAME [output=FOLDER]
       genpol policies push FOLDER hf://OWNER/NAME

A policy is a folder of three files: weights.safetensors, policy.json (sizes, chunk, solver,
statistics of observations, training data, success rate) and README.md, a card. `genpol train
init=POLICY` begins from one; POLICY is a folder, the name of one that comes with genpol, or
hf://OWNER/NAME[@REVISION] on the Hugging Face hub.

  list   the policies that come with genpol, or those in a folder
  show   what policy.json says
  pack   makes a policy of a run that has a flow or diffusion model (bc, ogpo): of its last
         checkpoint, or of the one that RUN names
  import makes a policy of what another library saved, which sees vectors (no images). FORMAT is
           dppo       state_*.pt, with config.yaml (or .hydra/config.yaml) and normalization.npz
                      beside it or in the folder above
           reinflow   the same of ReinFlow
           robomimic  model_epoch_*.pth of its diffusion policy
           lerobot    the folder of a DiffusionPolicy: config.json, model.safetensors, and the
                      files of its processors
         Pickles are never run. Options:
           env=NAME            where it was trained, if not what the file says
           steps=N             sample by DDIM in N steps, or a flow in N; else as its library does
           action_steps=N      actions of a chunk that are carried out
           control_period_s=S  seconds per action, which are else not compared with env's
           action_range=[L,H]  bounds of the actions where it was trained, if not [-1,1]
           config=FILE normalization=FILE   where they lie, for dppo and reinflow
  pull   fetches one from the hub, and copies it to FOLDER if that is given
  push   puts one on the hub, with the token of `hf auth login`

examples:
  genpol policies list
  genpol policies pack runs/cube-single-play/bc/20261123-101500-s0 output=policies/cube
  genpol policies import --format dppo state_3000.pt output=policies/hopper
  genpol train env=cube-single-play env.task=1 agent=ogpo init=policies/cube
"""


def run(arguments: list[str]) -> int:
    """Do what the first argument says.

    Raises:
        ConfigError: If it is not one of the actions, or the rest does not fit it.
        CheckpointError: If a policy is damaged.
        DatasetError: If a folder exists or cannot be written.
        GenpolError: If the hub does not answer.
    """
    given = arguments[0] if arguments else ""
    if given not in ACTIONS:
        raise ConfigError(
            f"unknown action {given!r}.{nearest(given, ACTIONS)} The actions are "
            f"{', '.join(ACTIONS)}; see `genpol policies --help`"
        )
    known: tuple[str, ...] = ("output",)
    if given == "import":
        from genpol.cli.policies_import import OPTIONS, joined

        arguments, known = joined(arguments), OPTIONS
    names, options = _divide(arguments[1:], known)
    ACTIONS[given](names, options)
    return 0


def _divide(arguments: Sequence[str], known: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    # Hydra names folders like seed=0: in the midst of a path that is no option.
    names = [text for text in arguments if "=" not in text or "/" in text.split("=")[0]]
    options = dict(text.split("=", 1) for text in arguments if text not in names)
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {name!r}.{nearest(name, known)}")
    return names, options


def _list(names: Sequence[str], options: dict[str, str]) -> None:
    from genpol.cli.initial import shipped_policies
    from genpol.training.policy_folder import is_policy_folder, read_record

    _refuse(options, "list")
    if len(names) > 1:
        raise ConfigError("write genpol policies list [FOLDER]")
    found = shipped_policies()
    if names:
        folder = Path(names[0])
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
        found = {x.name: x for x in sorted(folder.iterdir()) if is_policy_folder(x)}
    if not found:
        sys.stdout.write("no policies here\n")
        return
    rows = [_row(name, read_record(path)) for name, path in found.items()]
    if not sys.stdout.isatty():
        sys.stdout.writelines("\t".join(row) + "\n" for row in rows)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for title in ("name", "environment", "model", "success"):
        table.add_column(title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _row(name: str, record: dict[str, Any]) -> tuple[str, str, str, str]:
    model, success = record["model"], record["success"]
    kind = f"{model['denoiser']}, chunks of {model['horizon']}, {model['solver_steps']} steps"
    rate = success.get("success_mean")
    return name, record["env"], kind, "not told" if rate is None else f"{rate:.2f}"


def _show(names: Sequence[str], options: dict[str, str]) -> None:
    import json

    from genpol.cli.initial import locate
    from genpol.training.policy_folder import read, read_record

    _refuse(options, "show")
    folder = locate(_one(names, "show POLICY"))
    weights = read(folder).weights  # which verifies them
    record = read_record(folder)
    if (statistics := record.pop("statistics")) is not None:
        record["statistics"] = f"of {len(statistics['mean'])} numbers"
    record["parameters"] = sum(x.numel() for x in weights.values())
    sys.stdout.write(json.dumps(record, indent=1) + "\n")


def _pack(names: Sequence[str], options: dict[str, str]) -> None:
    from genpol.cli.initial import of_run

    run = _one(names, "pack RUN output=FOLDER")
    target = _output(options, "pack RUN")
    _write(target, of_run(Path(run)))


def _import(names: Sequence[str], options: dict[str, str]) -> None:
    from genpol.cli.policies_import import read

    target = _output(options, "import --format FORMAT PATH")
    _write(target, read(names, options))


def _pull(names: Sequence[str], options: dict[str, str]) -> None:
    from genpol.cli.initial import download
    from genpol.training.policy_folder import read

    folder = download(_one(names, "pull hf://OWNER/NAME"))
    policy = read(folder)
    if "output" in options:
        _write(Path(options["output"]), policy)
    else:
        sys.stdout.write(f"{folder}\n")


def _push(names: Sequence[str], options: dict[str, str]) -> None:
    from genpol.cli.initial import hub_error, parse_hub
    from genpol.training.policy_folder import CARD, RECORD, WEIGHTS, read

    _refuse(options, "push")
    if len(names) != 2:
        raise ConfigError("write genpol policies push FOLDER hf://OWNER/NAME")
    folder, address = Path(names[0]), names[1]
    repository, revision = parse_hub(address)
    read(folder)  # nothing damaged is shared
    import huggingface_hub as hub

    try:
        client = hub.HfApi()
        client.create_repo(repository, exist_ok=True)
        client.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            allow_patterns=[WEIGHTS, RECORD, CARD],
        )
    except Exception as error:
        raise hub_error(address, error) from None
    sys.stdout.write(f"{address}\n")


def _write(target: Path, policy: PretrainedPolicy) -> None:
    from genpol.training.policy_folder import write

    write(target, policy)
    sys.stdout.write(f"{target}\n")


def _one(names: Sequence[str], usage: str) -> str:
    if len(names) != 1:
        raise ConfigError(f"write genpol policies {usage}")
    return names[0]


def _output(options: dict[str, str], usage: str) -> Path:
    if not options.get("output"):
        raise ConfigError(f"write genpol policies {usage} output=FOLDER")
    return Path(options["output"])


def _refuse(options: dict[str, str], action: str) -> None:
    if options:
        raise ConfigError(f"genpol policies {action} takes no {next(iter(options))}=")


ACTIONS = {
    "list": _list,
    "show": _show,
    "pack": _pack,
    "import": _import,
    "pull": _pull,
    "push": _push,
}
