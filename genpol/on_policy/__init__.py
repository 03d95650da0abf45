"""Learning from fresh rollouts: settings, what acts, surrogates, and the learner."""

from genpol.on_policy.actors import ActorCritic, DecodedPolicy, Decoder, Encoder
from genpol.on_policy.agent import DecodedAgent, GaussianAgent, OnPolicyAgent, gaussian_learner
from genpol.on_policy.denoising import DenoisingAgent, DenoisingPolicy, DenoisingSettings
from genpol.on_policy.learner import OnPolicyLearner
from genpol.on_policy.likelihood import Evaluation, Likelihood, Rows
from genpol.on_policy.settings import GaussianSettings, OnPolicySettings

__all__ = [
    "ActorCritic",
    "DecodedAgent",
    "DecodedPolicy",
    "Decoder",
    "DenoisingAgent",
    "DenoisingPolicy",
    "DenoisingSettings",
    "Encoder",
    "Evaluation",
    "GaussianAgent",
    "GaussianSettings",
    "Likelihood",
    "OnPolicyAgent",
    "OnPolicyLearner",
    "OnPolicySettings",
    "Rows",
    "gaussian_learner",
]
