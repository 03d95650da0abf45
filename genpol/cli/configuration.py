"""From the command line's overrides to typed settings, with errors a person can act on.

Hydra composes the groups (which agent, which environment, which recipe); the single values are then
set here, one by one, so that an error can name the field it belongs to. Hydra's own errors run over
several lines and speak of struct flags; each is told here in one line as a ``ConfigError``.
"""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, Node, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from omegaconf.nodes import BooleanNode, FloatNode, IntegerNode, StringNode

from genpol.cli.list import GROUPS, config_folder, names
from genpol.errors import ConfigError, nearest
from genpol.training.settings import Choices, TrainSettings

_NOUNS = {"agent": "agent", "env": "environment", "recipe": "recipe"}
_LISTS = {group: plural for plural, group in GROUPS.items()}
# Settings that make an environment another one.
_IDENTITY = (
    *("env.name", "env.id", "env.domain", "env.task", "env.tasks"),
    *("env.goal_conditioned", "env.success_timing", "env.reward", "env.observation_steps"),
)
_OPTIONAL_GROUPS = ("recipe",)
_NONE = ("none", "null", "None", "")
_EXPECTED = {
    BooleanNode: "true or false",
    IntegerNode: "an integer",
    FloatNode: "a number",
    StringNode: "text",
    ListConfig: "a list",
    DictConfig: "a group of settings",
}


def chosen_agent(overrides: Sequence[str]) -> str:
    """Return the agent that overrides choose, themselves or by the default.

    Raises:
        ConfigError: As :func:`compose` does.
    """
    name: str = compose([x for x in overrides if not x.startswith("agent.")]).choices.agent
    return name


def compose(
    overrides: Sequence[str],
    *,
    model: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> DictConfig:
    """Compose one run's configuration, typed by :class:`TrainSettings`.

    Args:
        overrides: As on the command line: ``env=HopperStand``, ``agent.learning_rate=1e-3``,
            ``recipe=none``. Whole numbers may be written ``2e6`` or ``2_000_000``.
        model: Settings of the agent that a pretrained policy comes with, and which are not to be
            changed.
        defaults: Those that may be.

    Raises:
        ConfigError: In one line, naming the override, the field or the file that is wrong.
    """
    parsed = [_parse(text) for text in overrides]
    _refuse_duplicates(parsed)
    chosen = {item.key_or_group: _option(item) for item in parsed if item.key_or_group in _NOUNS}
    register_schemas(chosen.get("agent") or _default("agent"))
    config = _compose_groups(chosen)
    _apply_run_defaults(config)
    for name, value in {**(model or {}), **(defaults or {})}.items():
        _assign(config, f"agent.{name}", value)
    for item in parsed:
        if item.key_or_group not in _NOUNS:
            _assign(config, item.key_or_group, item.value())
    for name, value in (model or {}).items():
        _insist(config, f"agent.{name}", value)
    return config


def _insist(config: DictConfig, key: str, value: Any) -> None:
    """Refuse a setting that contradicts the policy that the run begins from."""
    if isinstance(value, Mapping):
        for name, nested in value.items():
            _insist(config, f"{key}.{name}", nested)
    elif (found := OmegaConf.select(config, key)) != value:
        raise ConfigError(
            f"{key} = {found}: the policy of init has {value}; leave it out, for the policy's "
            "settings are taken over"
        )


def _apply_run_defaults(config: DictConfig) -> None:
    """Put in the run's settings that suit agent and environment, where no recipe says otherwise.

    Families of environments have ``default_num_envs``, settings of agents ``run_defaults``.
    """
    plain = OmegaConf.structured(TrainSettings)
    suited = dict(getattr(OmegaConf.get_type(config.agent), "run_defaults", {}))
    few = getattr(OmegaConf.get_type(config.env), "default_num_envs", None)
    if few is not None:
        suited["num_envs"] = few
    for key, value in suited.items():
        if OmegaConf.select(config, key) == OmegaConf.select(plain, key):
            OmegaConf.update(config, key, value)


def load(path: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """Restore the configuration that a run saved, typed again, and apply overrides to it.

    Args:
        path: The ``config.yaml`` of a run folder.
        overrides: Single values to change; the groups are those of the run.

    Raises:
        ConfigError: If the file is missing, is not a run's configuration or holds settings that
            this version does not know.
    """
    parsed = [_parse(text) for text in overrides]
    _refuse_duplicates(parsed)
    for item in parsed:
        if item.key_or_group in _NOUNS:
            raise ConfigError(f"{item.input_line}: a run keeps the {item.key_or_group} it has")
        if item.key_or_group in _IDENTITY:
            raise ConfigError(f"{item.input_line}: a run keeps the environment it has")
    try:
        config = _restore(_read(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    for item in parsed:
        _assign(config, item.key_or_group, item.value())
    return config


def to_settings(config: DictConfig) -> TrainSettings:
    """Turn a composed configuration into frozen dataclasses, which check their own bounds.

    Raises:
        ConfigError: If a mandatory value is missing or out of bounds; the message has the field's
            full path.
    """
    for section in ("env", "agent"):
        _section_to_object(config, section)
    try:
        settings = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise _from_omegaconf(error, config) from None
    if not isinstance(settings, TrainSettings):
        raise TypeError(f"the configuration is not typed by TrainSettings but {type(settings)}")
    return settings


def register_schemas(agent: str) -> None:
    """Tell Hydra the settings dataclasses of the training loop, one agent and every simulator.

    They are named ``train_schema``, ``<agent>_schema`` and ``<family>_schema``; the YAML files
    start from them. Hydra copies all that it was told of whenever it composes, which takes more
    than a second with all agents: it forgets the others.
    """
    agents = importlib.import_module("genpol.agents")
    envs = importlib.import_module("genpol.envs")
    store = ConfigStore.instance()
    store.store(name="train_schema", node=_writable(TrainSettings))
    store.repo.pop("agent", None)
    if agent in agents.names():
        node = _writable(agents.settings_class(agent))
        store.store(group="agent", name=f"{agent}_schema", node=node)
    for family, settings_class in envs.settings_classes().items():
        store.store(group="env", name=f"{family}_schema", node=_writable(settings_class))


def _default(group: str) -> str:
    """Return the option of a group that ``train.yaml`` chooses, if it chooses one."""
    entries = yaml.safe_load((config_folder() / "train.yaml").read_text(encoding="utf-8"))
    found = (x[group] for x in entries["defaults"] if isinstance(x, dict) and group in x)
    return str(next(found, ""))


def _writable(settings_class: type) -> DictConfig:
    """Return a dataclass as a configuration that can be merged into.

    OmegaConf makes a frozen dataclass read-only, and Hydra could then not fill it.
    """
    config = OmegaConf.structured(settings_class)
    assert isinstance(config, DictConfig)
    pending: list[Node] = [config]
    while pending:
        node = pending.pop()
        node._set_flag("readonly", None)
        if isinstance(node, DictConfig):
            pending.extend(_children(node).values())
    return config


# --- reading overrides -----------------------------------------------------------------------


def _parse(text: str) -> Override:
    if "=" not in text[1:] and not text.startswith("~"):
        raise ConfigError(_not_an_override(text))
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException as error:
        reason = str(error).split(" expecting ")[0]
        raise ConfigError(
            f"cannot read {text!r}: {_one_line(reason)}; write key=value, and a value with special"
            " signs in two kinds of quotes: 'key=\"a=(b)\"'"
        ) from None
    if override.key_or_group == "experiment":
        raise ConfigError(f"{text!r}: experiments are run by `genpol reproduce <name>`")
    if override.is_sweep_override():
        raise ConfigError(
            f"{text!r} asks for several runs; give one value, a list in brackets as in [1,2], or "
            "--multirun"
        )
    if override.package is not None:
        raise ConfigError(f"{text!r}: packages (@) are not supported; write key=value")
    if override.is_delete() and override.key_or_group not in _OPTIONAL_GROUPS:
        raise ConfigError(f"{text!r}: only ~recipe can be left out")
    return override


def _not_an_override(text: str) -> str:
    if text.startswith("-"):
        bare = text.lstrip("-").replace("-", "_")
        return f"unknown option {text!r}; settings are written {bare or 'key'}=value"
    for group in _NOUNS:
        if text in names(group):
            return f"cannot read {text!r}: write {group}={text}"
    return f"cannot read {text!r}: write key=value, for example env=HopperStand"


def _refuse_duplicates(overrides: Iterable[Override]) -> None:
    seen: dict[str, str | None] = {}
    for override in overrides:
        key = override.key_or_group
        if key in seen:
            raise ConfigError(
                f"{key} is given twice: {seen[key]!r} and {override.input_line!r}; keep one"
            )
        seen[key] = override.input_line


def _option(override: Override) -> str:
    """Return the checked name that a group is set to."""
    group = override.key_or_group
    value = None if override.is_delete() else override.value()
    if isinstance(value, dict | list):
        raise ConfigError(f"{override.input_line!r}: {group} is a name, see {_hint(group)}")
    name = "" if value is None else str(value)
    _check_option(group, name)
    return name


def _check_option(group: str, name: str) -> None:
    if name in _NONE and group in _OPTIONAL_GROUPS:
        return
    known = names(group)
    if name in _NONE:
        raise ConfigError(f"{group} is empty: name an {_NOUNS[group]}; {_hint(group)} shows all")
    if name not in known:
        raise ConfigError(
            f"unknown {_NOUNS[group]} {name!r}.{nearest(name, known)} {_hint(group)} shows all"
        )


def _hint(group: str) -> str:
    return f"`genpol list {_LISTS[group]}`"


# --- composing -------------------------------------------------------------------------------


def _compose_groups(chosen: Mapping[str, str]) -> DictConfig:
    overrides = [
        f"~{group}" if name in _NONE else f"{group}={name}" for group, name in chosen.items()
    ]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder()), job_name="genpol", version_base="1.3"):
            config = hydra_compose("train", overrides=overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise _from_hydra(error) from None
    composed = config.hydra.runtime.choices
    with open_dict(config):
        del config["hydra"]
    for group in _NOUNS:
        config.choices[group] = _name_of_choice(group, composed.get(group))
    return config


def _name_of_choice(group: str, name: str | None) -> str:
    # Hydra reports the recipe it looked for, whether or not there is one.
    return name if name is not None and name in names(group) else ""


def _from_hydra(error: Exception) -> ConfigError:
    """Tell an error of the composition, which is one of the YAML files' unless env is missing."""
    message = str(error)
    if message.startswith("You must specify 'env'"):
        return ConfigError(
            "no environment given: add env=<name>, for example env=HopperStand;"
            f" {_hint('env')} shows all"
        )
    where = re.search(r"In '([^']+)'", message)
    file = f"{config_folder() / where[1]}.yaml: " if where else ""
    key = re.search(r"full_key: (\S+)", message)
    reason = message.split("raised while composing config:")[-1].split("full_key:")[0]
    if "is not in struct" in reason or "not in '" in reason:
        return ConfigError(f"{file}unknown setting {key[1] if key else _one_line(reason)!r}")
    missing = re.search(r"Could not find '(\w+)/([^']+)'", message)
    if missing and missing[1] in _NOUNS:
        group, name = missing.groups()
        suggestion = nearest(name, names(group))
        return ConfigError(f"{file}unknown {_NOUNS[group]} {name!r}.{suggestion}")
    return ConfigError(f"{file}{key[1] + ': ' if key else ''}{_one_line(reason)}")


# --- setting single values -------------------------------------------------------------------


def _assign(config: DictConfig, key: str, value: Any) -> None:
    """Set one value, or the values of a nested dictionary one by one."""
    node = _find(config, key)
    if key.split(".")[0] == "choices":
        raise ConfigError(f"{key} is filled in by genpol; write agent=, env= or recipe= instead")
    if isinstance(node, DictConfig) and node._is_none() and isinstance(value, Mapping):
        OmegaConf.update(config, key, _writable(node._metadata.ref_type), merge=False)
        node = _find(config, key)  # a group that is null by default, such as agent.actor of dppo
    if isinstance(node, DictConfig) and not node._is_none() and isinstance(value, Mapping):
        for name, nested in value.items():
            _assign(config, f"{key}.{name}", nested)
        return
    if isinstance(node, DictConfig) and value is not None and not isinstance(value, Mapping):
        inner = next(iter(_children(node)), "<name>")
        raise ConfigError(f"{key} = {value!r}: is a group of settings; set {key}.{inner}=<value>")
    if isinstance(node, IntegerNode) and isinstance(value, float) and value.is_integer():
        value = int(value)  # 2e6, which the grammar of overrides reads as a float
    try:
        OmegaConf.update(config, key, value, merge=True)
    except OmegaConfBaseException:
        written = "null" if value is None else repr(value)
        raise ConfigError(f"{key} = {written}: must be {_expected(node)}") from None


def _find(config: DictConfig, key: str) -> Node | None:
    """Return the node at a dotted path, or say which part of the path is unknown."""
    node: Node | None = config
    parts = key.split(".")
    for depth, part in enumerate(parts):
        if isinstance(node, ListConfig):
            return None  # an index, which OmegaConf checks
        if not isinstance(node, DictConfig) or node._is_none() or part not in _children(node):
            raise ConfigError(_unknown(config, node, parts, depth))
        node = _children(node)[part]
    return node


def _unknown(config: DictConfig, node: Node | None, parts: list[str], depth: int) -> str:
    path = ".".join(parts)
    prefix = "".join(f"{part}." for part in parts[:depth])
    if not isinstance(node, DictConfig) or node._is_none():
        return f"unknown setting {path!r}: {prefix[:-1]} has no settings of its own"
    known = [name for name in _children(node) if f"{prefix}{name}" != "choices"]
    elsewhere = [leaf for leaf in _leaves(config) if leaf.split(".")[-1] == parts[-1]]
    close = difflib.get_close_matches(parts[depth], known, n=1, cutoff=0.6)
    suggestions = [f"{prefix}{name}" for name in close] or elsewhere[:1]
    if suggestions:
        return f"unknown setting {path!r}. Did you mean {suggestions[0]!r}?"
    return f"unknown setting {path!r}; {prefix[:-1] or 'a run'} has {', '.join(known)}"


def _expected(node: Node | None) -> str:
    if node is None:
        return "an element of the list"
    expected = next((text for kind, text in _EXPECTED.items() if isinstance(node, kind)), "")
    if isinstance(node, ListConfig):
        element = getattr(node._metadata.element_type, "__name__", "")
        expected += f" of {element}, such as [1, 2]" if element else ""
    return (expected or "of another type") + (" or null" if node._is_optional() else "")


def _children(node: DictConfig) -> dict[str, Node]:
    """Return the nodes of a group by name; none if the group is null, missing or a reference."""
    content = node._content
    return {str(key): child for key, child in content.items()} if isinstance(content, dict) else {}


def _leaves(node: Node, path: str = "") -> list[str]:
    """Return the dotted paths of all values under a node."""
    if not isinstance(node, DictConfig):
        return [path]
    prefix = f"{path}." if path else ""
    return [leaf for key, child in _children(node).items() for leaf in _leaves(child, prefix + key)]


# --- checking --------------------------------------------------------------------------------


def _section_to_object(config: DictConfig, section: str) -> None:
    """Build one section alone, for the sake of its errors: they do not know where they stand."""
    try:
        OmegaConf.to_object(config[section])
    except ConfigError as error:
        raise ConfigError(_located(str(error), section, config[section])) from None
    except OmegaConfBaseException as error:
        raise _from_omegaconf(error, config) from None


def _located(message: str, section: str, node: Node) -> str:
    """Complete the field that a message starts with to its full path."""
    field, _, rest = message.partition(" ")
    leaves = _leaves(node)
    inner = [leaf for leaf in leaves if leaf == field] or [
        leaf for leaf in leaves if leaf.endswith(f".{field}")
    ]
    return f"{section}.{inner[0]} {rest}" if len(inner) == 1 else message


def _from_omegaconf(error: OmegaConfBaseException, config: DictConfig) -> ConfigError:
    key = error.full_key or "the configuration"
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(f"{key} is not set: add {key}=<value>")
    node = error.parent_node._get_node(error.key) if error.parent_node is not None else None
    written = f" = {node._value()!r}" if isinstance(node, Node) else ""
    return ConfigError(f"{key}{written}: {_one_line(str(error.msg or error))}")


# --- restoring -------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    try:
        saved = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"is not a configuration: {_one_line(str(error))}") from None
    known = {field.name for field in fields(Choices)}
    if not isinstance(saved, dict) or not isinstance(saved.get("choices"), dict):
        raise ConfigError("is not the configuration of a genpol run: it has no choices")
    if not set(saved["choices"]) <= known:
        raise ConfigError(f"has unknown choices; those known are {', '.join(sorted(known))}")
    return {str(key): value for key, value in saved.items()}


def _restore(saved: dict[str, Any]) -> DictConfig:
    choices = {str(group): str(name) for group, name in saved.pop("choices").items()}
    chosen = {group: choices.get(group, "") for group in ("agent", "env")}
    for group, name in chosen.items():
        _check_option(group, name)
    register_schemas(chosen["agent"])
    # The saved values include those of the recipe as it was then; today's may have changed.
    config = _compose_groups({**chosen, "recipe": "none"})
    config.choices.update(choices)
    for key, value in saved.items():
        _assign(config, key, value)
    return config


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines()]
    return " ".join(
        line for line in lines if line and not line.startswith(("object_type=", "full_key:"))
    )
