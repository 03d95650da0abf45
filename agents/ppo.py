"""Proximal policy optimisation with a Gaussian policy: the yardstick.

Schulman et al. 2017 (arXiv 1707.06347): maximise ``E[min(r A, clip(r, 1-c, 1+c) A)]`` over several
passes of each rollout, ``r`` the likelihood ratio and ``A`` the generalised advantage estimate
(Schulman et al. 2016), whose bootstrap uses the true last observation where an episode was cut by
its time limit.

Choices that published baselines often get wrong, and that are right here: observation statistics
merge exactly and are the same in rollout and optimisation; the tanh that bounds the action belongs
to the environment, so the density is that of the Gaussian; the standard deviation depends on the
observation; the step size follows the measured divergence (``target_kl``).

Unlike the textbook's, it holds the Gaussian near N(0, I) by a KL of weight 0.01, as it must where a
decoder follows (``agent.prior=none`` leaves it out); and the value loss is not clipped, for which
no benefit has been shown (Andrychowicz et al. 2021, arXiv 2006.05990).
"""

from __future__ import annotations

from dataclasses import dataclass

from genpol.on_policy import GaussianAgent, GaussianSettings


@dataclass(frozen=True, kw_only=True)
class Settings(GaussianSettings):
    """Hyper-parameters of PPO: those every on-policy agent has."""


class PPO(GaussianAgent):
    """Gaussian PPO; ``agent.surrogate`` puts another loss in place of the clipped one."""


AGENT = PPO
