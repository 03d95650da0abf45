from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from genpol.errors import CheckpointError, ConfigError, NonFiniteError
from genpol.objectives.gradient_estimators import (
    HARPG,
    NPGIGT,
    hessian_vector_product,
    power_decay,
)
from genpol.training import checkpoint

CURVATURE = torch.tensor([[3.0, 1.0, 0.5], [1.0, 2.0, -0.5], [0.5, -0.5, 1.0]]).double()
IGT_ETA = power_decay(1.0, 4 / 5)
HARPG_ETA = power_decay(1.0, 1.0)


def make_parameters() -> list[Tensor]:
    values = torch.tensor([1.0, -2.0]), torch.tensor([0.5])
    return [value.double().requires_grad_() for value in values]


def quadratic(parameters: list[Tensor]) -> Tensor:
    theta = torch.cat(parameters) - 0.3
    return 0.5 * theta @ CURVATURE @ theta


def cubic(parameters: list[Tensor]) -> Tensor:
    return torch.cat(parameters).pow(3).sum()


def gradients_of(loss, parameters: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss(parameters), parameters))


def without_chance(loss, parameters: list[Tensor]):
    """Return trajectories whose surrogate is the loss, and which no parameter makes likelier."""
    return lambda: (loss(parameters).view(1), 0.0 * parameters[0].sum().view(1))


def check_all(actual, expected) -> None:
    torch.testing.assert_close(torch.cat(list(actual)), torch.cat(list(expected)))


def test_igt_weights_decay_as_published():
    weights = [IGT_ETA(iteration) for iteration in range(4)]
    assert weights == pytest.approx([1.0, 0.722981, 0.574349, 0.480450], abs=1e-6)


# N-PG-IGT


def test_igt_transports_a_linear_gradient_exactly():
    parameters = make_parameters()
    igt = NPGIGT(parameters, eta=IGT_ETA, gamma=lambda t: 0.3, max_look_ahead=math.inf)
    for _ in range(8):
        here = gradients_of(quadratic, parameters)
        with igt.look_ahead():
            gradients = gradients_of(quadratic, parameters)
        igt.step(gradients)
        check_all(igt.state_dict()["momentum"], here)


@pytest.mark.parametrize(("cap", "stretch"), [(5.0, 5.0), (math.inf, 99.0)])
def test_igt_looks_ahead_no_further_than_its_cap(cap, stretch):
    parameters = make_parameters()
    before = [parameter.detach().clone() for parameter in parameters]
    igt = NPGIGT(parameters, eta=lambda t: 0.01, gamma=lambda t: 0.1, max_look_ahead=cap)
    igt.step(gradients_of(quadratic, parameters))
    after = [parameter.detach().clone() for parameter in parameters]
    expected = [a + stretch * (a - b) for a, b in zip(after, before, strict=True)]
    with igt.look_ahead():
        check_all([p.detach() for p in parameters], expected)


def test_igt_puts_parameters_back_to_the_bit_even_after_an_error():
    parameters = [torch.randn(50, requires_grad=True)]
    igt = NPGIGT(parameters, eta=IGT_ETA, gamma=lambda t: 0.1)
    igt.step([torch.randn(50)])
    before = parameters[0].detach().clone()

    def fail_ahead() -> None:
        with igt.look_ahead():
            assert not torch.equal(parameters[0], before)
            raise KeyError

    with pytest.raises(KeyError):
        fail_ahead()
    assert torch.equal(parameters[0], before)


def test_a_graph_made_ahead_cannot_be_differentiated_behind():
    parameters = make_parameters()
    igt = NPGIGT(parameters, eta=IGT_ETA, gamma=lambda t: 0.1)
    with igt.look_ahead():
        loss = parameters[0].square().sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("normalize", "lengths"), [("global", (0.1, 0.0)), ("layer", (0.1 / 2**0.5, 0.1 / 2**0.5))]
)
def test_igt_steps_have_the_length_gamma(normalize, lengths):
    parameters = [torch.zeros(3, requires_grad=True), torch.zeros(4, requires_grad=True)]
    igt = NPGIGT(parameters, eta=IGT_ETA, gamma=lambda t: 0.1, normalize=normalize)
    igt.step([torch.full((3,), 1e6), torch.full((4,), 1e-6)])
    assert [p.detach().norm().item() for p in parameters] == pytest.approx(lengths, abs=1e-6)


def test_steps_go_down():
    parameters = [torch.zeros(1, requires_grad=True)]
    NPGIGT(parameters, eta=IGT_ETA, gamma=lambda t: 0.1).step([torch.ones(1)])
    assert parameters[0].item() == pytest.approx(-0.1)


@pytest.mark.parametrize("normalize", ["global", "layer"])
def test_a_zero_gradient_moves_nothing(normalize):
    parameters = make_parameters()
    igt = NPGIGT(parameters, eta=IGT_ETA, gamma=lambda t: 0.1, normalize=normalize)
    igt.step([torch.zeros_like(parameter) for parameter in parameters])
    check_all([p.detach() for p in parameters], [p.detach() for p in make_parameters()])


def test_a_gradient_that_is_not_finite_changes_nothing():
    parameters = make_parameters()
    igt = NPGIGT(parameters, eta=IGT_ETA, gamma=lambda t: 0.1)
    with pytest.raises(NonFiniteError, match="iteration 0"):
        igt.step([torch.full((2,), torch.nan).double(), torch.ones(1).double()])
    assert igt.iteration == 0
    check_all([p.detach() for p in parameters], [p.detach() for p in make_parameters()])
    assert not torch.cat(igt.state_dict()["momentum"]).any()


@pytest.mark.parametrize("eta", [0.0, 1.5])
def test_weights_out_of_bounds_are_refused(eta):
    parameters = make_parameters()
    igt = NPGIGT(parameters, eta=lambda t: eta, gamma=lambda t: 0.1)
    igt.step(gradients_of(quadratic, parameters))  # the first weight is one in any case
    with pytest.raises(ConfigError, match="eta"), igt.look_ahead():
        pass


@pytest.mark.parametrize("make", [NPGIGT, HARPG])
def test_unknown_normalisation_is_refused(make):
    with pytest.raises(ConfigError, match="normalize"):
        make(make_parameters(), eta=IGT_ETA, gamma=IGT_ETA, normalize="tensor")


# HARPG


@pytest.mark.parametrize("theta", [0.0, 1.5])
def test_hessian_of_the_gaussian_bandit_is_minus_two(theta):
    """Return -(a - 1)^2 at a ~ N(theta, 1): J = -(theta - 1)^2 - 1."""
    mean = torch.tensor([theta], dtype=torch.float64, requires_grad=True)
    action = theta + torch.randn(400_000, dtype=torch.float64)
    log_prob = -0.5 * (action - mean).square()
    surrogate = -(action - 1).square() * log_prob
    (product,) = hessian_vector_product(surrogate, log_prob, [mean], [torch.ones_like(mean)])
    assert product.item() == pytest.approx(-2.0, abs=0.1)


class TwoStepBandit:
    """Two draws from softmax(theta_0, theta_1, 0); the second reward depends on both."""

    def __init__(self) -> None:
        self.parameters = [
            torch.tensor([value], dtype=torch.float64, requires_grad=True) for value in (0.7, -0.4)
        ]
        self.first_reward = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
        self.second_reward = torch.randn(3, 3, dtype=torch.float64)

    def log_policy(self, *parameters: Tensor) -> Tensor:
        logits = torch.cat((*parameters, torch.zeros(1, dtype=torch.float64)))
        return logits.log_softmax(-1)

    def expected_return(self, *parameters: Tensor) -> Tensor:
        p = self.log_policy(*parameters).exp()
        return p @ self.first_reward + p @ self.second_reward @ p

    def trajectories(self) -> tuple[Tensor, Tensor]:
        """Return all nine, surrogates weighted so that their mean is the exact expectation."""
        log_policy = self.log_policy(*self.parameters)
        log_prob = log_policy.unsqueeze(1) + log_policy.unsqueeze(0)
        to_go = self.first_reward.unsqueeze(1) + self.second_reward, self.second_reward
        surrogate = to_go[0] * log_policy.unsqueeze(1) + to_go[1] * log_policy.unsqueeze(0)
        weight = 9.0 * log_prob.detach().exp()
        return (weight * surrogate).flatten(), log_prob.flatten()


def test_hessian_vector_product_is_exact_over_all_trajectories():
    """A flipped second term, or a score that is a mean over steps or over the batch, fails."""
    bandit = TwoStepBandit()
    hessian = torch.autograd.functional.hessian(bandit.expected_return, tuple(bandit.parameters))
    matrix = torch.stack([torch.cat(row, dim=-1).squeeze(0) for row in hessian])
    for vector in torch.eye(2, dtype=torch.float64):
        product = hessian_vector_product(
            *bandit.trajectories(), bandit.parameters, list(vector.split(1))
        )
        torch.testing.assert_close(torch.cat(product), matrix @ vector)


def test_hessian_vector_product_turns_its_sign_with_the_surrogate():
    bandit = TwoStepBandit()
    surrogate, log_prob = bandit.trajectories()
    vector = [torch.ones(1).double(), torch.ones(1).double()]
    up = hessian_vector_product(surrogate, log_prob, bandit.parameters, vector)
    surrogate, log_prob = bandit.trajectories()
    down = hessian_vector_product(-surrogate, log_prob, bandit.parameters, vector)
    check_all(up, [-x for x in down])


def test_parameters_that_trajectories_do_not_depend_on_have_no_curvature():
    bandit, other = TwoStepBandit(), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    parameters = [*bandit.parameters, other]
    vector = [torch.ones_like(parameter) for parameter in parameters]
    product = hessian_vector_product(*bandit.trajectories(), parameters, vector)
    assert product[0].item() != 0
    assert torch.equal(product[2], torch.zeros_like(other))


def test_harpg_transports_a_linear_gradient_exactly():
    parameters = make_parameters()
    harpg = HARPG(parameters, eta=HARPG_ETA, gamma=lambda t: 0.1, normalize="none")
    loss = without_chance(quadratic, parameters)
    harpg.step(gradients_of(quadratic, parameters), harpg.hessian_correction(loss, 0.5))
    for fraction in torch.rand(8).double():
        momentum = harpg.state_dict()["momentum"]
        correction = harpg.hessian_correction(loss, fraction)
        here = gradients_of(quadratic, parameters)
        check_all([d + v for d, v in zip(momentum, correction, strict=True)], here)
        harpg.step(here, correction)


def test_harpg_corrects_by_the_hessian_in_between():
    """Along a segment a cubic's gradient changes by the Hessian at its middle, exactly."""
    parameters = make_parameters()
    harpg = HARPG(parameters, eta=HARPG_ETA, gamma=lambda t: 0.1, normalize="global")
    before = gradients_of(cubic, parameters)
    harpg.step(before, harpg.hessian_correction(without_chance(cubic, parameters), 0.5))
    change = [g - b for g, b in zip(gradients_of(cubic, parameters), before, strict=True)]
    check_all(harpg.hessian_correction(without_chance(cubic, parameters), 0.5), change)


def test_harpg_evaluates_at_the_fraction_of_the_last_step_and_puts_back():
    parameters = make_parameters()
    old = torch.cat(parameters).detach()
    harpg = HARPG(parameters, eta=HARPG_ETA, gamma=lambda t: 0.1, normalize="global")
    harpg.step(gradients_of(quadratic, parameters), [torch.zeros_like(p) for p in parameters])
    new = torch.cat(parameters).detach()
    seen = []

    def trajectories() -> tuple[Tensor, Tensor]:
        seen.append(torch.cat(parameters).detach())
        return without_chance(quadratic, parameters)()

    harpg.hessian_correction(trajectories, 0.25)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], 0.75 * old + 0.25 * new)
    assert torch.equal(torch.cat(parameters), new)


def test_harpg_needs_no_hessian_before_its_first_step():
    def trajectories() -> tuple[Tensor, Tensor]:
        raise AssertionError("collected for nothing")

    harpg = HARPG(make_parameters(), eta=HARPG_ETA, gamma=lambda t: 0.1, normalize="none")
    correction = harpg.hessian_correction(trajectories, 0.5)
    assert not torch.cat(correction).any()


def test_harpg_follows_its_recursion():
    parameters = [torch.zeros(1, requires_grad=True)]
    harpg = HARPG(parameters, eta=lambda t: 0.25, gamma=power_decay(0.1, 0.5), normalize="none")
    harpg.step([torch.tensor([2.0])], [torch.zeros(1)])
    assert parameters[0].item() == pytest.approx(-0.2)
    harpg.step([torch.tensor([8.0])], [torch.tensor([-4.0])])
    momentum = 0.75 * (2.0 - 4.0) + 0.25 * 8.0
    assert parameters[0].item() == pytest.approx(-0.2 - 0.1 * (2 / 3) ** 0.5 * momentum)


# Both


class GaussianBandit:
    """Loss (a - 2)^2 at a ~ N(theta, 0.5^2), in batches of 32."""

    def __init__(self) -> None:
        self.mean = torch.zeros(1, requires_grad=True)
        self.generator = torch.Generator().manual_seed(0)

    def trajectories(self) -> tuple[Tensor, Tensor]:
        noise = torch.empty(32).normal_(generator=self.generator)
        action = self.mean.detach() + 0.5 * noise
        loss = (action - 2.0).square()
        log_prob = -2.0 * (action - self.mean).square()
        return (loss - loss.mean()) * log_prob, log_prob

    def gradients(self) -> list[Tensor]:
        return list(torch.autograd.grad(self.trajectories()[0].mean(), [self.mean]))


def make_igt(bandit: GaussianBandit) -> NPGIGT:
    return NPGIGT([bandit.mean], eta=IGT_ETA, gamma=power_decay(0.5, 1.0))


def make_harpg(bandit: GaussianBandit) -> HARPG:
    return HARPG([bandit.mean], eta=HARPG_ETA, gamma=power_decay(0.3, 0.5), normalize="none")


def make_normalized_harpg(bandit: GaussianBandit) -> HARPG:
    return HARPG([bandit.mean], eta=HARPG_ETA, gamma=power_decay(0.5, 1.0), normalize="global")


MAKERS = [make_igt, make_harpg, make_normalized_harpg]


def iterate(bandit: GaussianBandit, estimator: NPGIGT | HARPG) -> None:
    if isinstance(estimator, NPGIGT):
        with estimator.look_ahead():
            gradients = bandit.gradients()
        estimator.step(gradients)
    else:
        fraction = torch.rand((), generator=bandit.generator)
        correction = estimator.hessian_correction(bandit.trajectories, fraction)
        estimator.step(bandit.gradients(), correction)


@pytest.mark.parametrize("make", MAKERS)
def test_bandit_is_solved(make):
    bandit = GaussianBandit()
    estimator = make(bandit)
    for _ in range(80):
        iterate(bandit, estimator)
    assert bandit.mean.item() == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("make", MAKERS)
def test_training_resumes_exactly_from_a_checkpoint(make, tmp_path):
    straight = GaussianBandit()
    estimator = make(straight)
    for _ in range(4):
        iterate(straight, estimator)
    state = {
        "estimator": estimator.state_dict(),
        "mean": straight.mean.detach(),
        "generator": straight.generator.get_state(),
    }
    path = checkpoint.save(tmp_path, "step-4", state, metadata={})
    for _ in range(3):
        iterate(straight, estimator)

    saved = checkpoint.load(path)
    resumed = GaussianBandit()
    resumed.generator.set_state(saved["generator"])
    fresh = make(resumed)
    with torch.no_grad():
        resumed.mean.copy_(saved["mean"])
    fresh.load_state_dict(saved["estimator"])
    for _ in range(3):
        iterate(resumed, fresh)
    assert torch.equal(straight.mean, resumed.mean)
    # A normalised step in one dimension is a sign; the momentum says more.
    assert torch.equal(estimator.state_dict()["momentum"][0], fresh.state_dict()["momentum"][0])


def test_a_saved_state_stays_what_it_was():
    bandit = GaussianBandit()
    estimator = make_igt(bandit)
    iterate(bandit, estimator)
    state = estimator.state_dict()
    momentum = state["momentum"][0].clone()
    iterate(bandit, estimator)
    assert state["iteration"] == 1
    assert torch.equal(state["momentum"][0], momentum)


def test_a_state_of_other_parameters_is_refused():
    state = make_igt(GaussianBandit()).state_dict()
    with pytest.raises(CheckpointError, match="shapes"):
        NPGIGT(make_parameters(), eta=IGT_ETA, gamma=IGT_ETA).load_state_dict(state)


def test_metrics_are_the_norms_of_gradient_and_momentum():
    igt = NPGIGT([torch.zeros(2, requires_grad=True)], eta=lambda t: 0.5, gamma=lambda t: 0.1)
    igt.step([torch.tensor([3.0, 4.0])])
    metrics = igt.step([torch.tensor([-3.0, 0.0])])
    assert metrics["policy/grad_norm"].item() == pytest.approx(3.0)
    assert metrics["policy/momentum_norm"].item() == pytest.approx(2.0)
