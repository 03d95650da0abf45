"""Learning from fresh rollouts: settings, what acts, surrogates, and the learner."""

from genpol.on_policy.actors import DecodedPolicy, Decoder, Encoder
from genpol.on_policy.agent import GaussianAgent
from genpol.on_policy.learner import OnPolicyLearner
from genpol.on_policy.settings import OnPolicySettings

__all__ = [
    "DecodedPolicy",
    "Decoder",
    "Encoder",
    "GaussianAgent",
    "OnPolicyLearner",
    "OnPolicySettings",
]
