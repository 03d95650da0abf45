"""Algorithms: one file each, holding a settings dataclass and one agent class.

Nothing here imports torch until an agent is asked for, so that listing names is instant.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

from genpol.errors import ConfigError, nearest

if TYPE_CHECKING:
    from genpol.agent import Agent, Specs

# Each module defines ``Settings`` and an agent class named by its ``AGENT``.
_NAMES = (
    "bc",
    "best_of_n",
    "bpo",
    "cdsa",
    "dppo",
    "dqc",
    "dsrl",
    "fisher_decorator",
    "fpo",
    "fql",
    "gorl",
    "harpg",
    "iql",
    "mbdpo",
    "mdpo",
    "mdpo_off_policy",
    "npg_igt",
    "ogpo",
    "ppo",
    "qc",
    "qgf",
    "reinflow",
    "residual",
    "rlpd",
    "sac",
    "tdmpc2",
)


def names() -> list[str]:
    """Return the names of all agents."""
    return list(_NAMES)


def settings_class(name: str) -> type:
    """Return the settings dataclass of agent ``name``.

    Raises:
        ConfigError: If there is no such agent.
    """
    return _module(name).Settings


def agent_class(name: str) -> type[Agent]:
    """Return the class of agent ``name``.

    Raises:
        ConfigError: If there is no such agent.
    """
    found: type[Agent] = _module(name).AGENT
    return found


def holders() -> list[str]:
    """Return the names of the agents that begin from a policy folder; this imports them all."""
    from genpol.pretrained import PolicyHolder

    return [name for name in _NAMES if issubclass(agent_class(name), PolicyHolder)]


def make(name: str, settings: Any, specs: Specs, *, device: str = "cpu", seed: int) -> Agent:
    """Build agent ``name`` for an environment with ``specs``.

    Args:
        name: One of :func:`names`.
        settings: An instance of :func:`settings_class`.
        specs: Sizes of the environment.
        device: Where its tensors live.
        seed: Seed of its weights, its exploration and its minibatches.

    Raises:
        ConfigError: If there is no such agent.
    """
    return _module(name).AGENT(settings, specs, device=device, seed=seed)


def _module(name: str) -> ModuleType:
    if name not in _NAMES:
        raise ConfigError(
            f"unknown agent {name!r}.{nearest(name, _NAMES)} `genpol list agents` shows all"
        )
    return importlib.import_module(f"genpol.agents.{name}")
