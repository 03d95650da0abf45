"""What agents share that learn from a data set: networks, acting by plans, and the update."""

from genpol.offline.agent import Draws, OfflineAgent, Windows
from genpol.offline.networks import ChunkNetwork, Critic, StateValue, make_denoiser
from genpol.offline.policy import PlanningPolicy
from genpol.offline.settings import FlowSettings, NetworkSettings, OfflineSettings

__all__ = [
    "ChunkNetwork",
    "Critic",
    "Draws",
    "FlowSettings",
    "NetworkSettings",
    "OfflineAgent",
    "OfflineSettings",
    "PlanningPolicy",
    "StateValue",
    "Windows",
    "make_denoiser",
]
