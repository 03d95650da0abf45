"""The torchrl loss modules: formulas, gradients, state, and a PPO script where only they change."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    set_composite_lp_aggregate,
)
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.testing import assert_close
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import (
    Compose,
    DoubleToFloat,
    ExplorationType,
    GymEnv,
    RewardScaling,
    StepCounter,
    TransformedEnv,
    set_exploration_type,
)
from torchrl.modules import (
    IndependentNormal,
    OneHotCategorical,
    ProbabilisticActor,
    TanhNormal,
    TruncatedNormal,
    ValueOperator,
)
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

from genpol.errors import ConfigError
from genpol.objectives import surrogates
from genpol.objectives.bpo import bpo, bpo_target, soft_median_loss
from genpol.objectives.torchrl_losses import BPOLoss, MDPOLoss, R2VPOLoss
from genpol.on_policy.surrogate_settings import BPOSettings, MDPOSettings, R2VPOSettings

OURS = [BPOLoss, MDPOLoss, R2VPOLoss]
ROWS, OBSERVATION, ACTION = 12, 3, 2
REWARD_SCALE = 0.1
TANH = {"distribution_class": TanhNormal, "distribution_kwargs": {"low": -2.0, "high": 2.0}}
TRUNCATED = TANH | {"distribution_class": TruncatedNormal}


def make_actor(distribution_class=IndependentNormal, distribution_kwargs=None):
    net = nn.Sequential(nn.Linear(OBSERVATION, 2 * ACTION), NormalParamExtractor())
    return ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=distribution_class,
        distribution_kwargs=distribution_kwargs,
        return_log_prob=True,
    )


def make_critic(key="state_value"):
    return ValueOperator(nn.Linear(OBSERVATION, 1), in_keys=["observation"], out_keys=[key])


def make_data(actor, critic, batch=(ROWS,)):
    """Return what a collector and GAE leave: actions of ``actor``, advantages, targets."""
    data = TensorDict({"observation": torch.randn(*batch, OBSERVATION)}, batch)
    with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
        actor(data)
        critic(data)
    data["advantage"] = torch.randn(*batch, 1)
    data["value_target"] = data["state_value"] + torch.randn(*batch, 1)
    return data


def with_next(data):
    """Add what a value estimator needs."""
    no = torch.zeros(*data.shape, 1, dtype=torch.bool)
    data["next"] = TensorDict(
        {
            "observation": torch.randn(*data.shape, OBSERVATION),
            "reward": torch.randn(*data.shape, 1),
            "done": no,
            "terminated": no,
        },
        data.shape,
    )
    return data


def move(module, by=0.3):
    """Change all weights, so that ratios are not 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))


class Setup:
    """Networks, and data of an actor that has moved since."""

    def __init__(self, by=0.3, **actor):
        self.actor, self.critic = make_actor(**actor), make_critic()
        self.data = make_data(self.actor, self.critic)
        move(self.actor, by)
        move(self.critic, by)
        self.now = self.actor.get_dist(self.data.clone())
        log_ratio = self.now.log_prob(self.data["action"]) - self.data["action_log_prob"]
        self.log_ratio = log_ratio.detach()[:, None]
        self.value = self.critic(self.data.clone())["state_value"].detach()


@pytest.fixture
def setup():
    return Setup()


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)


# -- formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("median", [False, True])
def test_bpo_is_the_pure_function(setup, median):
    network = make_critic("state_median")
    options = {"low": 0.1, "high": 0.3, "temperature": 0.5, "huber": 0.05}
    loss = BPOLoss(setup.actor, setup.critic, network if median else None, **options)
    loss.median_coeff = 0.5
    out = loss(setup.data)

    returns = setup.data["value_target"]
    prediction = network(setup.data.clone())["state_median"]
    centre = prediction.detach() if median else setup.value
    target = bpo_target(returns - centre, low=0.9, high=1.3, temperature=0.5)
    expected = bpo(setup.log_ratio, returns - setup.value, target=target, huber=0.05)
    assert_close(out["loss_objective"], expected.mean())
    assert ("loss_median" in out) == median
    if median:
        assert_close(out["loss_median"], 0.5 * soft_median_loss(prediction, returns).mean())


def test_bpo_stored_weight_is_the_advantage_in_the_data(setup):
    out = BPOLoss(setup.actor, setup.critic, weight="stored")(setup.data)
    returns = setup.data["value_target"]
    target = bpo_target(returns - setup.value, low=0.8, high=1.2, temperature=1e-3)
    expected = bpo(setup.log_ratio, setup.data["advantage"], target=target)
    assert_close(out["loss_objective"], expected.mean())


def test_bpo_pulls_back_where_ppo_is_flat(setup):
    # All ratios 1.5 and all advantages positive.
    data, actor = setup.data, setup.actor
    now = setup.now.log_prob(data["action"]).detach()
    data["action_log_prob"] = now - torch.tensor(1.5).log()
    data["advantage"] = torch.ones(ROWS, 1)
    data["value_target"] = setup.value + 1.0
    flat = ClipPPOLoss(actor, setup.critic)(data)["loss_objective"]
    pull = BPOLoss(actor, setup.critic)(data)["loss_objective"]
    assert all((g == 0).all() for g in gradients(flat, actor))
    descent = gradients(pull, actor)
    with torch.no_grad():
        for parameter, gradient in zip(actor.parameters(), descent, strict=True):
            parameter.sub_(1e-3 * gradient)
    after = actor.get_dist(data.clone()).log_prob(data["action"])
    assert after.mean() < now.mean() - 1e-4


@pytest.mark.parametrize("epsilon", [0.3, (0.1, 0.4)])
def test_bpo_takes_clip_epsilon_as_its_box(setup, epsilon):
    loss = BPOLoss(setup.actor, setup.critic, clip_epsilon=epsilon)
    assert (loss.low, loss.high) == (epsilon if isinstance(epsilon, tuple) else (0.3, 0.3))


@pytest.mark.parametrize("per_dimension", [False, True])
def test_mdpo_is_the_hand_formula(per_dimension):
    setup = Setup(**TANH)
    loss = MDPOLoss(setup.actor, setup.critic, step_size=0.25, per_dimension=per_dimension)
    out = loss(setup.data)

    parameters = setup.actor.get_dist_params(setup.data.clone())
    new = Independent(Normal(parameters["loc"], parameters["scale"]), 1)
    old = Independent(Normal(setup.data["loc"], setup.data["scale"]), 1)
    kl = kl_divergence(new, old).mean()
    ratio = (setup.now.log_prob(setup.data["action"]) - setup.data["action_log_prob"]).exp()
    share = ACTION if per_dimension else 1
    expected = 4.0 * kl / share - (ratio * setup.data["advantage"][:, 0]).mean()
    assert kl > 0.01
    assert_close(out["loss_objective"], expected)
    assert_close(out["kl"], kl.detach())
    assert_close(*(gradients(x, setup.actor) for x in (out["loss_objective"], expected)))


def test_mdpo_estimates_a_divergence_without_closed_form():
    setup = Setup(**TRUNCATED)
    out = MDPOLoss(setup.actor, setup.critic, step_size=0.25)(setup.data)
    ratio = setup.log_ratio.exp()
    estimate = (ratio * setup.log_ratio - (ratio - 1)).mean()
    assert_close(out["kl"], estimate)
    assert_close(out["loss_objective"], 4 * estimate - (ratio * setup.data["advantage"]).mean())


def test_mdpo_knows_categoricals():
    net = TensorDictModule(nn.Linear(OBSERVATION, 4), in_keys=["observation"], out_keys=["logits"])
    actor = ProbabilisticActor(
        net, in_keys=["logits"], distribution_class=OneHotCategorical, return_log_prob=True
    )
    critic = make_critic()
    data = make_data(actor, critic)
    move(actor)
    new = actor.get_dist_params(data.clone())["logits"].log_softmax(-1)
    kl = (new.exp() * (new - data["logits"].log_softmax(-1))).sum(-1).mean().detach()
    assert_close(MDPOLoss(actor, critic)(data)["kl"], kl)


def test_composite_actions_have_one_joint_ratio():
    heads = {"move": TanhNormal, "grip": OneHotCategorical}
    outputs = [("params", "move", name) for name in ("loc", "scale")]
    move_net = nn.Sequential(nn.Linear(OBSERVATION, 2 * ACTION), NormalParamExtractor())
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(move_net, ["observation"], outputs),
        TensorDictModule(
            nn.Linear(OBSERVATION, 4), ["observation"], [("params", "grip", "logits")]
        ),
        ProbabilisticTensorDictModule(
            in_keys=["params"],
            out_keys=list(heads),
            distribution_class=CompositeDistribution,
            distribution_kwargs={"distribution_map": heads},
            return_log_prob=True,
        ),
    )
    critic = make_critic()
    with set_composite_lp_aggregate(False):
        data = make_data(actor, critic)
        move(actor)
        now = actor.get_dist(data.clone()).log_prob(data.select(*heads))
        log_ratio = sum(now[f"{head}_log_prob"] - data[f"{head}_log_prob"] for head in heads)
        ratio = log_ratio.detach().exp()[:, None]
        out = MDPOLoss(actor, critic)(data)
        estimate = (ratio * ratio.log() - (ratio - 1)).mean()
        assert_close(out["loss_objective"], estimate - (ratio * data["advantage"]).mean())
        assert {"entropy", "composite_entropy"} <= set(BPOLoss(actor, critic)(data).keys())


def test_mdpo_without_the_old_distribution_says_what_is_missing(setup):
    with pytest.raises(ConfigError, match=r"^MDPOLoss: no 'scale' in the data"):
        MDPOLoss(setup.actor, setup.critic)(setup.data.exclude("scale"))


def test_mdpo_schedule_is_that_of_the_agent(setup):
    loss = MDPOLoss(setup.actor, setup.critic, floor=0.15)
    sizes = []
    for iteration in (0, 5, 9, 30):
        loss.set_step_size(iteration, 10)
        sizes.append(loss.step_size.item())
    assert sizes == pytest.approx([1.0, 0.5, 0.15, 0.15])
    loss.floor = 0.0
    loss.set_step_size(30, 10)
    assert loss.step_size.item() == pytest.approx(0.1)
    loss.step_size = 0.4
    assert isinstance(loss.step_size, torch.Tensor)
    assert loss(setup.data)["step_size"].item() == pytest.approx(0.4)


def test_r2vpo_is_the_pure_function(setup):
    out = R2VPOLoss(setup.actor, setup.critic, multiplier=2.0, delta=0.1)(setup.data)
    rows = surrogates.r2vpo(setup.log_ratio, setup.data["advantage"], multiplier=2.0, delta=0.1)
    assert_close(out["loss_objective"], rows.mean())
    assert_close(out["ratio_variance"], (setup.log_ratio.exp() - 1).square().mean())


@pytest.mark.parametrize("cls", [R2VPOLoss, MDPOLoss])
def test_gradient_at_ratio_one_is_that_of_ppo(cls):
    setup = Setup(by=0.0, **TANH)
    options = {"entropy_bonus": False, "normalize_advantage": False}
    expected = ClipPPOLoss(setup.actor, setup.critic, **options)(setup.data)["loss_objective"]
    actual = cls(setup.actor, setup.critic, **options)(setup.data)["loss_objective"]
    expected = gradients(expected, setup.actor)
    assert min(g.abs().max() for g in expected) > 1e-2
    assert_close(gradients(actual, setup.actor), expected, rtol=1e-4, atol=1e-6)


# -- state ---------------------------------------------------------------------------------------


def test_multiplier_steps_on_the_mean_over_all_rows(setup):
    loss = R2VPOLoss(setup.actor, setup.critic, rate=3.0)
    loss(setup.data[:2])
    loss(setup.data[2:])  # of another size: a mean of means would differ
    loss.eval()
    loss(setup.data[:5])  # does not count
    loss.step_multiplier()
    moment = (setup.log_ratio.exp() - 1).square().mean()
    expected = 0.5 + 3.0 * (moment - 0.02)
    assert_close(loss.multiplier, expected)
    loss.train()
    loss(setup.data[:3])  # the next epoch
    loss.step_multiplier()
    moment = (setup.log_ratio[:3].exp() - 1).square().mean()
    assert_close(loss.multiplier, expected + 3.0 * (moment - 0.02))
    with pytest.raises(ConfigError, match="no rows since the last step"):
        loss.step_multiplier()


def test_multiplier_may_step_before_the_backward_pass(setup):
    loss = R2VPOLoss(setup.actor, setup.critic)
    objective = loss(setup.data)["loss_objective"]
    expected = gradients(loss(setup.data)["loss_objective"], setup.actor)
    loss.step_multiplier()
    assert_close(gradients(objective, setup.actor), expected)


def test_masked_rows_count_nowhere(setup):
    valid = torch.arange(ROWS) < 7
    masked = setup.data.clone().set("shifted_valid", valid[:, None])
    kept = setup.data[valid]
    masked["action_log_prob"][~valid] -= 5.0  # a huge ratio
    for cls in OURS:
        actual, expected = (cls(setup.actor, setup.critic) for _ in range(2))
        got, wanted = actual(masked), expected(kept)
        assert_close(got["loss_objective"], wanted["loss_objective"])
        if cls is R2VPOLoss:
            actual.step_multiplier()
            expected.step_multiplier()
            assert_close(actual.multiplier, expected.multiplier)


@pytest.mark.parametrize("cls", [MDPOLoss, R2VPOLoss])
def test_state_survives_a_round_trip(setup, cls):
    # Restored in the middle of an epoch, and R2VPO goes on to the same multiplier.
    loss, other = (cls(copy.deepcopy(setup.actor), setup.critic) for _ in range(2))
    loss(setup.data)
    if cls is R2VPOLoss:
        loss.step_multiplier()
        loss(setup.data)
    else:
        loss.set_step_size(3, 10)
    other.load_state_dict(loss.state_dict())
    assert_close(other(setup.data)["loss_objective"], loss(setup.data)["loss_objective"])
    if cls is R2VPOLoss:
        assert other.multiplier.item() != pytest.approx(0.5)
        loss.step_multiplier()
        other.step_multiplier()
        assert_close(other.multiplier, loss.multiplier)
    else:
        assert other.step_size.item() == pytest.approx(0.7)


# -- gradients reach the right networks ----------------------------------------------------------


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("cls", OURS)
def test_every_loss_reaches_its_network_alone(setup, cls, functional):
    networks = {"loss_objective": setup.actor, "loss_critic": setup.critic}
    extra = {}
    if cls is BPOLoss:
        networks["loss_median"] = extra["median_network"] = make_critic("state_median")
    loss = cls(setup.actor, setup.critic, entropy_bonus=False, functional=functional, **extra)
    out = loss(setup.data)
    assert {key for key in set(out.keys()) if key.startswith("loss_")} == set(networks)
    for key in networks:
        for other, network in networks.items():
            found = torch.autograd.grad(
                out[key], list(network.parameters()), retain_graph=True, allow_unused=True
            )
            reached = any(g is not None and (g != 0).any() for g in found)
            assert reached == (key == other), (key, other)


def test_all_parameters_are_the_optimisers(setup):
    median = make_critic("state_median")
    loss = BPOLoss(setup.actor, setup.critic, median)
    expected = {id(p) for net in (setup.actor, setup.critic, median) for p in net.parameters()}
    assert {id(p) for p in loss.parameters()} == expected


def test_median_does_not_train_what_it_shares(setup):
    shared = setup.critic.module
    head = nn.Linear(1, 1)
    median = ValueOperator(
        nn.Sequential(shared, head), in_keys=["observation"], out_keys=["state_median"]
    )
    out = BPOLoss(setup.actor, setup.critic, median)(setup.data)
    found = torch.autograd.grad(
        out["loss_median"], [*shared.parameters(), *head.parameters()], allow_unused=True
    )
    assert [g is None for g in found] == [True, True, False, False]


# -- as ClipPPOLoss ------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OURS)
def test_everything_but_the_surrogate_is_that_of_ppo(setup, cls):
    options = {"entropy_coeff": 0.3, "critic_coeff": 0.7, "loss_critic_type": "l2"}
    options["clip_value"] = 0.01
    expected = ClipPPOLoss(setup.actor, setup.critic, **options)(setup.data)
    loss = cls(setup.actor, setup.critic, **options)
    actual = loss(setup.data)
    own = {"loss_objective", "clip_fraction"}
    shared = set(expected.keys()) - own
    assert shared == {
        *("entropy", "loss_entropy", "loss_critic", "explained_variance", "kl_approx"),
        *("ESS", "max_ratio", "mean_ratio", "value_clip_fraction"),
    }
    for key in shared:
        assert_close(actual[key], expected[key], msg=lambda text, key=key: f"{key}: {text}")
    assert set(loss.out_keys) | {"explained_variance"} == set(actual.keys())


def test_clip_fraction_of_bpo_is_that_of_ppo(setup):
    expected = ClipPPOLoss(setup.actor, setup.critic)(setup.data)["clip_fraction"]
    assert 0.0 < expected < 1.0
    assert_close(BPOLoss(setup.actor, setup.critic)(setup.data)["clip_fraction"], expected)


@pytest.mark.parametrize("cls", OURS)
def test_reductions_agree(setup, cls):
    mean, total, rows = (
        cls(setup.actor, setup.critic, reduction=reduction)(setup.data)["loss_objective"]
        for reduction in ("mean", "sum", "none")
    )
    assert rows.shape == (ROWS,)
    assert_close(rows.mean(), mean)
    assert_close(rows.sum(), total)


@pytest.mark.parametrize("cls", [MDPOLoss, R2VPOLoss])
def test_advantage_is_normalised_on_demand(setup, cls):
    loss = cls(setup.actor, setup.critic, normalize_advantage=True)(setup.data)
    advantage = setup.data["advantage"]
    setup.data["advantage"] = (advantage - advantage.mean()) / advantage.std()
    expected = cls(setup.actor, setup.critic)(setup.data)["loss_objective"]
    assert_close(loss["loss_objective"], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("data_has_advantage", [False, True])
def test_advantage_norm_learns_only_from_own_estimates(setup, data_has_advantage):
    class Norm:
        seen = 0

        def update(self, value_target):
            self.seen += value_target.numel()

        def scale(self):
            return 2.0

    norm = Norm()
    data = with_next(setup.data)
    if not data_has_advantage:
        data = data.exclude("advantage", "value_target", "state_value")
    R2VPOLoss(setup.actor, setup.critic, advantage_norm=norm)(data)
    assert norm.seen == (0 if data_has_advantage else ROWS)


@pytest.mark.parametrize("delay_actor", [False, True])
@pytest.mark.parametrize("cls", OURS)
def test_input_is_left_alone(setup, cls, delay_actor):
    before = setup.data.clone()
    cls(setup.actor, setup.critic, delay_actor=delay_actor)(setup.data)
    assert set(setup.data.keys()) == set(before.keys())
    assert (setup.data == before).all()


@pytest.mark.parametrize("key", ["advantage", "value_target"])
def test_flat_rows_make_no_outer_product(setup, key):
    setup.data[key] = setup.data[key].squeeze(-1)
    with pytest.raises((ValueError, ConfigError), match="outer product"):
        BPOLoss(setup.actor, setup.critic, critic_coeff=0.0)(setup.data)


@pytest.mark.parametrize("cls", OURS)
def test_keys_can_be_renamed(setup, cls):
    names = {"advantage": "A", "value_target": "G", "sample_log_prob": "old", "action": "a"}
    names["value"] = "V"
    networks = {"critic_network": make_critic("V")}
    networks["critic_network"].load_state_dict(setup.critic.state_dict())
    if cls is BPOLoss:
        names["median"] = "u"
        networks["median_network"] = make_critic("u")
    loss = cls(setup.actor, **networks)
    loss.set_keys(**names)
    defaults = {"sample_log_prob": "action_log_prob", "value": "state_value"}
    data = setup.data.clone()
    for role, name in names.items():
        if role != "median":
            data.rename_key_(defaults.get(role, role), name)
    out = loss(data)
    if cls is BPOLoss:
        networks["median_network"].out_keys = ["state_median"]
        expected = BPOLoss(setup.actor, setup.critic, networks["median_network"])(setup.data)
    else:
        expected = cls(setup.actor, setup.critic)(setup.data)
    assert_close(out["loss_objective"], expected["loss_objective"])
    assert_close(out["loss_critic"], expected["loss_critic"])
    with pytest.raises(ValueError, match="not an accepted"):
        loss.set_keys(medial="x")


@pytest.mark.parametrize("cls", OURS)
def test_loss_estimates_the_advantage_itself(setup, cls):
    actor, critic = setup.actor, setup.critic
    data = with_next(make_data(actor, critic, (4, 5)))
    data = data.exclude("advantage", "value_target", "state_value")
    move(actor)
    loss = cls(actor, critic)
    loss.make_value_estimator(gamma=0.9, lmbda=0.8)
    actual = loss(data)["loss_objective"]
    assert "advantage" not in data
    GAE(gamma=0.9, lmbda=0.8, value_network=critic)(data)
    assert_close(actual, cls(actor, critic)(data)["loss_objective"])


@pytest.mark.parametrize("cls", OURS)
def test_call_by_keyword(setup, cls):
    # Without a tensordict the result is a tuple in the order of out_keys.
    data = with_next(setup.data.exclude("advantage", "value_target", "state_value"))
    loss = cls(setup.actor, setup.critic)
    expected = loss(data)
    keywords = {
        key if isinstance(key, str) else "_".join(key): data[key]
        for key in loss.in_keys
        if key in data.keys(True)
    }
    out = loss(**keywords)
    assert len(out) == len(loss.out_keys)
    assert_close(out[0], expected["loss_objective"])


def test_in_keys_name_what_each_reads(setup):
    median = ValueOperator(nn.Linear(4, 1), in_keys=["state"], out_keys=["state_median"])
    assert "state" in BPOLoss(setup.actor, setup.critic, median).in_keys
    assert {"loc", "scale"} <= set(MDPOLoss(setup.actor, setup.critic).in_keys)


@pytest.mark.parametrize("cls", OURS)
def test_proximal_policy_is_the_centre(setup, cls):
    # It is a copy of the present actor: all ratios to it are 1, and p / b weighs the rows.
    loss = cls(setup.actor, setup.critic, delay_actor=True, reduction="none")
    actual = loss(setup.data)["loss_objective"][:, None]
    importance, advantage = setup.log_ratio.exp(), setup.data["advantage"]
    difference = setup.data["value_target"] - setup.value
    target = bpo_target(difference, low=0.8, high=1.2, temperature=1e-3)
    expected = {
        BPOLoss: importance * difference.abs() * (1 - target).abs(),
        MDPOLoss: -importance * advantage,
        R2VPOLoss: importance * (-advantage - 0.5 * 0.02),
    }
    assert_close(actual, expected[cls], rtol=1e-4, atol=1e-5)
    capped = cls(setup.actor, setup.critic, max_importance_ratio=1.0, reduction="none")
    assert capped(setup.data)["loss_objective"].isfinite().all()


@pytest.mark.parametrize("cls", OURS)
def test_hopeless_rows_stay_finite(setup, cls):
    setup.data["action_log_prob"] -= 1000.0
    objective = cls(setup.actor, setup.critic)(setup.data)["loss_objective"]
    assert objective.isfinite()
    assert all(g.isfinite().all() for g in gradients(objective, setup.actor))


@pytest.mark.parametrize(
    ("cls", "settings", "names"),
    [
        (
            BPOLoss,
            BPOSettings,
            ["low", "high", "temperature", "median_temperature", "huber", "weight"],
        ),
        (MDPOLoss, MDPOSettings, ["floor", "schedule", "per_dimension"]),
        (R2VPOLoss, R2VPOSettings, ["delta", "multiplier", "rate", "maximum"]),
    ],
)
def test_defaults_are_those_of_the_agents(cls, settings, names):
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    parameters = inspect.signature(cls.__init__).parameters
    assert {name: parameters[name].default for name in names} == {n: defaults[n] for n in names}


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (BPOLoss, {"normalize_advantage": True}, "BPOLoss: normalize_advantage .* leave them out"),
        (BPOLoss, {"critic_network": None}, "BPOLoss: needs critic_network"),
        (BPOLoss, {"low": 1.5}, "BPOLoss.low = 1.5: must lie in"),
        (BPOLoss, {"weight": "onlin"}, "Did you mean 'online'"),
        (MDPOLoss, {"step_size": 0.0}, "MDPOLoss.step_size = 0.0: must be > 0"),
        (R2VPOLoss, {"delta": 0.0}, "R2VPOLoss.delta = 0.0: must be > 0"),
        (R2VPOLoss, {"entropy_coef": 0.1}, "no keyword 'entropy_coef'. Did you mean 'entropy_coe"),
        (R2VPOLoss, {"clip_value": True}, "R2VPOLoss: clip_value = True: give the radius"),
    ],
)
def test_what_is_refused(setup, cls, options, message):
    networks = {"actor_network": setup.actor, "critic_network": setup.critic}
    with pytest.raises(ConfigError, match=message) as error:
        cls(**(networks | options))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cls", [MDPOLoss, R2VPOLoss])
def test_clip_epsilon_is_taken_with_a_warning(setup, cls):
    with pytest.warns(UserWarning, match=f"{cls.__name__} clips nothing"):
        cls(setup.actor, setup.critic, clip_epsilon=0.2)


def test_package_does_not_import_torchrl():
    code = "import sys, genpol.objectives; sys.exit('torchrl' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- in place of ClipPPOLoss ---------------------------------------------------------------------


def make_env():
    env = GymEnv("InvertedPendulum-v5")
    # Returns of order 10, as the critic likes them.
    scaling = RewardScaling(loc=0.0, scale=REWARD_SCALE)
    return TransformedEnv(env, Compose(DoubleToFloat(), StepCounter(max_steps=200), scaling))


def episode_reward(actor, episodes):
    """Return the mean reward of an episode, at most 200."""
    env = make_env()
    env.set_seed(1000)
    with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
        rewards = [env.rollout(200, actor)["next", "reward"].sum() for _ in range(episodes)]
    env.close()
    return torch.stack(rewards).mean().item() / REWARD_SCALE


def train(loss_class, *, total_frames, frames_per_batch, epochs, minibatch):
    """Run torchrl's PPO tutorial in small; nothing but ``loss_class`` is about the loss."""
    torch.manual_seed(0)
    env = make_env()
    env.set_seed(0)

    def mlp(outputs):
        return [nn.LazyLinear(64), nn.Tanh(), nn.LazyLinear(64), nn.Tanh(), nn.LazyLinear(outputs)]

    actor = ProbabilisticActor(
        TensorDictModule(
            nn.Sequential(*mlp(2 * env.action_spec.shape[-1]), NormalParamExtractor()),
            in_keys=["observation"],
            out_keys=["loc", "scale"],
        ),
        spec=env.action_spec,
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={
            "low": env.action_spec.space.low,
            "high": env.action_spec.space.high,
        },
        return_log_prob=True,
    )
    critic = ValueOperator(nn.Sequential(*mlp(1)), in_keys=["observation"])
    actor(env.reset())
    critic(env.reset())

    collector = Collector(
        env, actor, frames_per_batch=frames_per_batch, total_frames=total_frames, split_trajs=False
    )
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(frames_per_batch), sampler=SamplerWithoutReplacement()
    )
    advantage = GAE(gamma=0.99, lmbda=0.95, value_network=critic, average_gae=True)
    loss_module = loss_class(
        actor_network=actor,
        critic_network=critic,
        entropy_bonus=True,
        entropy_coeff=1e-4,
        critic_coeff=1.0,
        loss_critic_type="smooth_l1",
    )
    optimizer = torch.optim.Adam(loss_module.parameters(), 1e-3)

    start = copy.deepcopy((actor, critic))
    history = []
    for batch in collector:
        for _ in range(epochs):
            advantage(batch)
            buffer.extend(batch.reshape(-1))
            for _ in range(frames_per_batch // minibatch):
                losses = loss_module(buffer.sample(minibatch))
                total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                total.backward()
                nn.utils.clip_grad_norm_(loss_module.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                history.append(losses.detach())
    collector.shutdown()
    return start, (actor, critic), history


@pytest.mark.parametrize("cls", [ClipPPOLoss, *OURS])
def test_tutorial_runs_with_any_of_them(cls):
    start, end, history = train(cls, total_frames=128, frames_per_batch=64, epochs=2, minibatch=32)
    assert len(history) == 8
    for losses in history:
        assert all(x.isfinite().all() for x in losses.values())
    for network, old_network in zip(end, start, strict=True):
        pairs = zip(network.parameters(), old_network.parameters(), strict=True)
        assert all((new != old).any() for new, old in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("cls", [ClipPPOLoss, *OURS])
def test_tutorial_learns_with_any_of_them(cls):
    start, end, _ = train(cls, total_frames=6144, frames_per_batch=1024, epochs=15, minibatch=128)
    before, after = (episode_reward(actor, 5) for actor, _ in (start, end))
    assert before < 10.0
    assert after > 30.0
