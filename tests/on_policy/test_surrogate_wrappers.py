"""What each surrogate makes of a minibatch: hand-computed rows, with its own settings in force."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import nn

from genpol.agent import Specs
from genpol.agents.ppo import Settings
from genpol.on_policy import ActorCritic, Evaluation, Likelihood, OnPolicyLearner
from genpol.on_policy.surrogate_settings import (
    BAPOSettings,
    BPOSettings,
    CovarianceSettings,
    EWMASettings,
    MDPOSettings,
    MHPOSettings,
    R2VPOSettings,
    SurrogateSettings,
)
from genpol.on_policy.surrogates import SURROGATES, Terms
from genpol.policies.gaussian import GaussianPolicy

vector = partial(torch.tensor, dtype=torch.float64)
ACTION_DIM = 4


def unasked(*_):
    raise AssertionError("this surrogate has no use for it")


def terms(ratio, advantage, **more):
    """Return rows of the given ratios; what is not given must not be read."""
    log_ratio = vector(ratio).log()
    nothing = torch.full_like(log_ratio, torch.nan)
    given = {
        "log_prob": nothing,
        "log_ratio": log_ratio,
        "advantage": vector(advantage),
        "target": nothing,
        "value": nothing,
        "median": None,
        "centred": None,
        "clip": None,
        "divergence": unasked,
        "proximal_log_prob": unasked,
    }
    return Terms(**(given | more))


def make(name, actor=None, **settings):
    actor = nn.Linear(1, 1) if actor is None else actor
    generator = torch.Generator().manual_seed(0)
    options = SurrogateSettings(surrogate=name, **settings)
    return SURROGATES[name](options, actor, ACTION_DIM, generator)


def rows_of(surrogate, rows):
    return surrogate.loss(rows)[0].tolist()


# -- PPO -----------------------------------------------------------------------------------------


def test_ppo_clips_at_its_setting_on_both_sides():
    rows = terms([1.5, 0.5, 1.05], [1.0, -1.0, 2.0])
    assert rows_of(make("ppo", clip=0.1), rows) == pytest.approx([-1.1, 0.9, -2.1])


def test_ppo_takes_the_clip_of_each_row_before_its_setting():
    rows = terms([1.5, 1.5, 0.5], [1.0, 1.0, -1.0], clip=vector([0.05, 0.3, 0.4]))
    assert rows_of(make("ppo", clip=0.1), rows) == pytest.approx([-1.05, -1.3, 0.6])


def test_ppo_bounds_the_loss_of_bad_actions_if_asked():
    rows = terms([9.0, 2.0], [-1.0, -1.0])
    assert rows_of(make("ppo", dual_clip=3.0), rows) == pytest.approx([3.0, 2.0])
    assert rows_of(make("ppo"), rows) == pytest.approx([9.0, 2.0])


# -- BPO -----------------------------------------------------------------------------------------

# Returns 2 and -1 against means of 5 and 1 and medians of 1.5 and -2: both are worse than the mean
# and better than the median, as happens between them.
BETWEEN = {
    "target": vector([2.0, -1.0]),
    "value": vector([5.0, 1.0]),
    "median": vector([1.5, -2.0]),
}


def test_bpo_weighs_by_the_mean_and_aims_by_the_median():
    # Weights |2 - 5| and |-1 - 1|, target 1.3 above the median.
    surrogate = make("bpo", bpo=BPOSettings(low=0.1, high=0.3, temperature=0.0))
    rows = terms([1.0, 1.5], [torch.nan] * 2, **BETWEEN)
    assert rows_of(surrogate, rows) == pytest.approx([3 * 0.3, 2 * 0.2])


def test_bpo_without_a_median_aims_by_the_mean():
    # Below the mean the target is 0.9.
    surrogate = make("bpo", bpo=BPOSettings(low=0.1, high=0.3, temperature=0.0, centre="mean"))
    rows = terms([1.0, 1.5], [torch.nan] * 2, **(BETWEEN | {"median": None}))
    assert rows_of(surrogate, rows) == pytest.approx([3 * 0.1, 2 * 0.6])


def test_bpo_may_weigh_by_the_advantages_of_the_rollout():
    surrogate = make("bpo", bpo=BPOSettings(temperature=0.0, weight="stored"))
    rows = terms([1.0, 1.5], [-0.5, 4.0], **BETWEEN)
    assert rows_of(surrogate, rows) == pytest.approx([0.5 * 0.2, 4.0 * 0.3])


def test_bpo_has_its_temperature_in_units_of_reward():
    # sigmoid(log 3) = 3/4, so the target is 0.9 + 0.75 x 0.4 = 1.2.
    own = BPOSettings(low=0.1, high=0.3, temperature=2.0)
    scaled = {"target": vector([1.0]), "value": vector([0.0])}
    median = scaled["target"] - 0.5 * 2.0 * math.log(3.0)
    rows = terms([1.0], [torch.nan], median=median, **scaled)
    assert rows_of(make("bpo", bpo=own, reward_scale=0.5), rows) == pytest.approx([0.2])


def test_bpo_of_groups_takes_their_mean_and_median():
    surrogate = make("bpo", bpo=BPOSettings(low=0.1, high=0.3, temperature=0.0))
    rows = terms([1.0, 1.5], [-0.5, 4.0], centred=vector([1.0, -1.0]), **BETWEEN)
    assert rows_of(surrogate, rows) == pytest.approx([0.5 * 0.3, 4.0 * 0.6])


def test_bpo_rounds_the_corner_if_asked():
    surrogate = make("bpo", bpo=BPOSettings(temperature=0.0, huber=0.4))
    rows = terms([1.0, 1.5], [torch.nan] * 2, **BETWEEN)
    expected = [3 * 0.2**2 / 0.8, 2 * 0.3**2 / 0.8]
    assert rows_of(surrogate, rows) == pytest.approx(expected)


# -- MDPO ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_dimension", "expected"), [(False, [2.8 - 1.5, 0.4 + 0.5]), (True, [0.7 - 1.5, 0.1 + 0.5])]
)
def test_mdpo_adds_the_divergence_over_the_step_size(per_dimension, expected):
    # The third of four iterations: a step size of 1/2.
    own = MDPOSettings(schedule_steps=32, per_dimension=per_dimension)
    surrogate = make("mdpo", mdpo=own)
    surrogate.begin_rollout(env_steps=24, batch_steps=8)
    rows = terms([1.5, 0.5], [1.0, -1.0], divergence=lambda: vector([1.4, 0.2]))
    assert rows_of(surrogate, rows) == pytest.approx(expected)


# -- R2VPO and MHPO ------------------------------------------------------------------------------


def test_r2vpo_adds_the_excess_of_the_second_moment():
    # Squared distances 0.04, 0, 0.25 less 0.1, times 2.
    surrogate = make("r2vpo", r2vpo=R2VPOSettings(multiplier=2.0, delta=0.1))
    rows = terms([0.8, 1.0, 1.5], [1.0, -1.0, 2.0])
    assert rows_of(surrogate, rows) == pytest.approx([-0.8 - 0.12, 1.0 - 0.2, -3.0 + 0.3])


def test_r2vpo_takes_its_dual_step_on_the_moment_of_a_whole_pass():
    surrogate = make("r2vpo", r2vpo=R2VPOSettings(multiplier=0.5, delta=0.02, rate=1.0))
    for ratio in (0.8, 1.0, 1.5):
        surrogate.loss(terms([ratio], [1.0]))
    surrogate.end_pass()
    assert surrogate.multiplier.item() == pytest.approx(0.5766667)


def test_mhpo_damps_growing_and_shrinking_ratios_apart():
    # exp(psi - zeta) by the table of the specification: r = 0.5, 1 and 2.
    own = MHPOSettings(normalise=False)
    rows = terms([0.5, 1.0, 2.0], [-1.0, 1.0, 2.0])
    expected = [math.exp(-0.6477 - 2.0570), -math.exp(-1.3278), -2 * math.exp(0.6477 - 1.3813)]
    assert rows_of(make("mhpo", mhpo=own), rows) == pytest.approx(expected, rel=2e-4)


def test_mhpo_reads_every_one_of_its_settings():
    # psi = 2 tanh(log(3) / 2) = 1: softplus(1) = log(1 + e), softplus(-1) = log(1 + 1/e).
    own = MHPOSettings(
        bound=2.0, up_power=3.0, up_scale=4.0, down_power=1.0, down_scale=0.5, normalise=False
    )
    hazard = (math.log1p(math.e) / 4) ** 3 + math.log1p(math.exp(-1)) / 0.5
    found = rows_of(make("mhpo", mhpo=own), terms([3.0], [1.0]))
    assert found == pytest.approx([-math.exp(1.0 - hazard)])


def test_normalised_mhpo_starts_from_the_policy_gradient():
    found = rows_of(make("mhpo"), terms([1.0, 2.0], [1.0, 1.0]))
    assert found == pytest.approx([-1.0, -math.exp(0.6477 - 1.3813 + 1.3278)], rel=2e-4)


# -- BAPO ----------------------------------------------------------------------------------------


def test_bapo_clips_at_the_bounds_it_finds():
    # Shares of the positives: 0.35 / 2.95 at (0.8, 1.2) and (0.9, 1.2), 1.85 / 4.45 at (0.9, 1.6).
    own = BAPOSettings(low_step=0.1, high_step=0.4, high_end=2.0, share=0.4)
    rows = terms([1.5, 0.7, 0.5, 1.3], [1.0, 0.5, -1.0, -2.0])
    losses, metrics = make("bapo", bapo=own).loss(rows)
    assert losses.tolist() == pytest.approx([-1.5, -0.35, 0.9, 2.6])
    found = [metrics[f"policy/{name}"].item() for name in ("low", "high", "positive_share")]
    assert found == pytest.approx([0.9, 1.6, 1.85 / 4.45])


def test_bapo_counts_clipped_values_if_asked():
    # Then raising the lower bound loses, and all of the upper range is tried in vain.
    own = BAPOSettings(low_step=0.1, high_step=0.4, high_end=2.0, share=0.4, measure="value")
    rows = terms([1.5, 0.7, 0.5, 1.3], [1.0, 0.5, -1.0, -2.0])
    metrics = make("bapo", bapo=own).loss(rows)[1]
    assert metrics["policy/high"].item() == pytest.approx(2.0)
    assert metrics["policy/positive_share"].item() == pytest.approx(1.85 / 5.35)


# -- PPO-EWMA ------------------------------------------------------------------------------------


def density(value):
    """Return an actor whose log-density is its one weight."""
    module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.constant_(module.weight, math.log(value))
    return module


def ewma(start, steps, **settings):
    """Return the loss of a row of density 0.9, 0.5 when it was collected, ``start`` before that."""
    actor = density(start)
    surrogate = make("ppo_ewma", actor, ewma=EWMASettings(decay=0.5), **settings)
    nn.init.constant_(actor.weight, math.log(0.9))
    for _ in range(steps):
        surrogate.end_step()
    rows = terms(
        [0.9 / 0.5],
        [1.0],
        log_prob=vector([0.9]).log(),
        proximal_log_prob=lambda module: module.weight.detach().flatten(),
    )
    return rows_of(surrogate, rows)


def test_ppo_ewma_clips_around_the_average():
    assert ewma(0.6, steps=0) == pytest.approx([-1.2 * 0.6 / 0.5])


@pytest.mark.parametrize(("steps", "share"), [(0, 1.0), (1, 1 / 3), (2, 1 / 7)])
def test_ppo_ewma_moves_its_average_with_every_step(steps, share):
    # Every step counts twice as much as what came before it, in logarithms.
    average = 0.3**share * 0.9 ** (1 - share)
    assert ewma(0.3, steps, clip=0.1) == pytest.approx([-1.1 * average / 0.5])


# -- Clip-Cov and KL-Cov -------------------------------------------------------------------------

# Covariances 0.390625, 0.515625, 1.828125, 1.203125.
COVARIANCES = {"log_prob": vector([-1.0, -2.0, -0.5, -3.0])}
ADVANTAGE = [1.0, -1.0, 2.0, -0.5]


def test_clip_cov_drops_a_row_of_its_window_and_clips_the_others():
    # Quantiles of 1/2 and 0.9 are 0.859 and 1.641: the last row alone lies between.
    own = CovarianceSettings(low_quantile=0.5, high_quantile=0.9, fraction=0.25)
    rows = terms([1.5, 0.9, 1.1, 1.1], ADVANTAGE, **COVARIANCES)
    found = rows_of(make("clip_cov", covariance=own, clip=0.3), rows)
    assert found == pytest.approx([-1.3, 0.9, -2.2, 0.0])


def test_kl_cov_holds_the_rows_of_greatest_covariance_and_clips_none():
    own = CovarianceSettings(fraction=0.25, coefficient=3.0)
    rows = terms([1.5, 0.5, 2.0, 1.1], ADVANTAGE, **COVARIANCES)
    penalty = 3 * math.log(2) ** 2 / 2
    found = rows_of(make("kl_cov", covariance=own), rows)
    assert found == pytest.approx([-1.5, 0.5, -4.0 + penalty, 0.55])


# -- several ratios to a row ---------------------------------------------------------------------


class TwoSteps(Likelihood):
    """Ratios of two steps for each row, each with a weight and a clip of its own."""

    def __init__(self, actor, *, weight=None, clip=None):
        self.actor = actor
        self.options = {"step_weight": weight, "step_clip": clip}

    def keep(self, batch, observation):
        raise NotImplementedError

    def log_prob(self, actor, rows):
        # Through the actor, so that there is something to differentiate.
        nothing = 0 * actor.at_normalized(rows["observation"])[0][:, :1]
        return rows["log_prob"] + rows["ratio"].log() + nothing

    def evaluate(self, rows):
        log_prob = self.log_prob(self.actor, rows)
        return Evaluation(
            log_prob=log_prob,
            regulariser=log_prob.new_zeros(()),
            divergence=lambda: 3.0 * torch.ones_like(log_prob),
            metrics={},
            **self.options,
        )


def loss_of_steps(surrogate="ppo", settings=None, **options):
    """Return the loss of two rows of advantages 1 and -1, ratios (1.5, 1.5) and (1, 0.5)."""
    made = Settings(surrogate=surrogate, prior="none", **(settings or {}))
    actor = GaussianPolicy(1, 1, [4])
    learner = OnPolicyLearner(
        ActorCritic(actor, 1, made, generator=torch.Generator()),
        made,
        specs=Specs(observation_dim=1, action_dim=ACTION_DIM, num_envs=2),
        generator=torch.Generator(),
        likelihood=TwoSteps(actor, **options),
    )
    rows = {
        "observation": torch.zeros(2, 1),
        "log_prob": torch.tensor([[-1.0, -2.0], [-3.0, -4.0]]),
        "ratio": torch.tensor([[1.5, 1.5], [1.0, 0.5]]),
        "advantage": torch.tensor([7.0, 3.0]),  # standardised
        "target": torch.tensor([[0.5], [-1.0]]),
    }
    value = torch.tensor([[0.25], [1.0]])
    median = None if learner.actor_critic.median_critic is None else torch.tensor([0.75, -2.0])
    return learner._actor_loss(rows, value, median)[0].item()


def test_every_step_has_the_advantage_of_its_row():
    assert loss_of_steps() == pytest.approx((-1.2 - 1.2 + 1.0 + 0.8) / 4)


def test_steps_are_clipped_each_at_its_own_bound():
    clip = torch.tensor([0.1, 0.3])
    assert loss_of_steps(clip=clip) == pytest.approx((-1.1 - 1.3 + 1.0 + 0.7) / 4)


def test_steps_count_by_their_weights():
    weight = torch.tensor([0.25, 1.0])
    expected = (-1.2 * 0.25 - 1.2 + 1.0 * 0.25 + 0.8) / 4
    assert loss_of_steps(weight=weight) == pytest.approx(expected)


def test_every_step_has_the_return_value_and_median_of_its_row():
    # Returns 0.5 and -1: below the median and 1/4 off the mean, above it and 2 off.
    bpo = BPOSettings(temperature=0.0)
    expected = (0.25 * 0.7 + 0.25 * 0.7 + 2.0 * 0.2 + 2.0 * 0.7) / 4
    assert loss_of_steps("bpo", {"bpo": bpo}) == pytest.approx(expected)


def test_every_step_has_a_divergence():
    expected = (-1.5 - 1.5 + 1.0 + 0.5) / 4 + 3.0 / ACTION_DIM
    mdpo = MDPOSettings(per_dimension=True)
    assert loss_of_steps("mdpo", {"mdpo": mdpo}) == pytest.approx(expected)


def test_ppo_ewma_reads_the_average_for_every_step():
    # The average is the actor itself, so that ratios to it are one and nothing is clipped.
    expected = (-1.5 - 1.5 + 1.0 + 0.5) / 4
    assert loss_of_steps("ppo_ewma") == pytest.approx(expected)
