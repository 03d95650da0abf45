"""Q-chunking: QC and QC-FQL.

Li, Zhou & Levine 2025 (arXiv 2507.07969): reinforcement learning on chunks of H = 5 actions, which
are carried out open loop. A chunk's critic backs up over all its H rewards without the bias of an
n-step return, and a flow of whole chunks explores coherently. ``policy=best_of`` is QC: the critics
choose among N chunks of the flow, for acting and in the target. ``policy=one_step`` is QC-FQL: FQL
on chunks.

See :mod:`genpol.offline.flow_q` for the losses.

Deviations: as in ``agent=fql``. Published on OGBench: ``best_of`` 32 (puzzle-3x3 64), QC-FQL's
``alpha`` 300 for up to two cubes, scenes and puzzles, 100 for three and four cubes.
"""

from __future__ import annotations

from dataclasses import dataclass

from genpol.offline.flow_q import FlowQ, FlowQSettings


@dataclass(frozen=True, kw_only=True)
class Settings(FlowQSettings):
    """Hyper-parameters of QC."""

    horizon: int = 5
    """Actions per chunk H: what is planned at once, and the length of a critic's backup."""
    policy: str = "best_of"
    """How actions are made: the `best_of` some chunks of the flow (QC), or `one_step` by a network
    that follows it (QC-FQL)."""


class QC(FlowQ):
    """Q-chunking, offline and then perhaps online."""


AGENT = QC
