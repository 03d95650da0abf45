"""What agents share that learn a world model and plan in it: networks, search, and the update."""

from genpol.world_model.agent import WorldModelAgent
from genpol.world_model.amortised import ScorePlanner
from genpol.world_model.energy import EnergyScale
from genpol.world_model.networks import Task, WorldModel
from genpol.world_model.planning import DiffusionPlanner, MPPIPlanner, Planner, PolicyPlanner
from genpol.world_model.settings import ModelSize, WorldModelSettings, check_candidates
from genpol.world_model.window import ModelLoss, Window

__all__ = [
    "DiffusionPlanner",
    "EnergyScale",
    "MPPIPlanner",
    "ModelLoss",
    "ModelSize",
    "Planner",
    "PolicyPlanner",
    "ScorePlanner",
    "Task",
    "Window",
    "WorldModel",
    "WorldModelAgent",
    "WorldModelSettings",
    "check_candidates",
]
