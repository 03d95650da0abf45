"""Flow Q-learning (FQL).

Park, Li & Levine 2025 (arXiv 2502.02538): a flow learns the behaviour in the data by imitation, and
a one-step network ``mu(s, z)`` is trained to raise Q while staying near what the flow makes of the
same noise, so that no gradient runs through the flow's steps (equation 8). Critics regress
``r + gamma Q'(s', clip(mu(s', z')))`` with the mean of two averaged critics. Acting is one pass.

See :mod:`genpol.offline.flow_q` for the losses; ``agent=qc agent.policy=one_step`` is the same on
chunks.

Deviations: layer norm has no gain and bias of its own; GELU is exact, where Flax approximates it;
for two cores networks are smaller by default (3 x 256 against 4 x 512) and runs shorter (500k
updates against 1M). The published ``alpha`` on OGBench: 300 for cubes and scenes, 1000 for puzzles,
10 for mazes (humanoidmaze 30).
"""

from __future__ import annotations

from dataclasses import dataclass

from genpol.offline.flow_q import FlowQ, FlowQSettings


@dataclass(frozen=True, kw_only=True)
class Settings(FlowQSettings):
    """Hyper-parameters of FQL."""


class FQL(FlowQ):
    """Flow Q-learning, offline and then perhaps online."""


AGENT = FQL
