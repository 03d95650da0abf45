"""Our own tasks of Isaac Lab, which need no download.

Importing a module of this package imports Isaac Lab.
"""

from __future__ import annotations

import gymnasium

_PLACES = {
    "Genpol-Cartpole": "cartpole:Cartpole",
    "Genpol-Hopper": "hopper:Hopper",
    "Genpol-Quadruped": "quadruped:Quadruped",
}


def register() -> None:
    """Make the tasks known to gymnasium, under the names that Isaac Lab's own trainers take too."""
    for name, place in _PLACES.items():
        if name not in gymnasium.registry:
            gymnasium.register(
                id=name,
                entry_point=f"{__name__}.{place}",
                disable_env_checker=True,
                kwargs={"env_cfg_entry_point": f"{__name__}.{place}Config"},
            )
