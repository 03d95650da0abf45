"""What agents share that learn from a data set: networks, acting by plans, and the update."""

from genpol.offline.agent import OfflineAgent
from genpol.offline.chunk_agent import ChunkAgent, Draws, Windows
from genpol.offline.networks import ChunkNetwork, Critic, StateValue, make_denoiser
from genpol.offline.policy import PlanningPolicy
from genpol.offline.settings import FlowSettings, NetworkSettings, OfflineSettings

__all__ = [
    "ChunkAgent",
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
