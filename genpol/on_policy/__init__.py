"""Learning from fresh rollouts: settings, what acts, surrogates, and the learner."""

from genpol.on_policy.actors import ActorCritic, DecodedPolicy, Decoder, Encoder
from genpol.on_policy.agent import GaussianAgent, gaussian_learner
from genpol.on_policy.learner import OnPolicyLearner
from genpol.on_policy.settings import GaussianSettings, OnPolicySettings

__all__ = [
    "ActorCritic",
    "DecodedPolicy",
    "Decoder",
    "Encoder",
    "GaussianAgent",
    "GaussianSettings",
    "OnPolicyLearner",
    "OnPolicySettings",
    "gaussian_learner",
]
