from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from genpol.errors import ConfigError
from genpol.policies.flow import (
    FlowPolicy,
    integrate,
    sde_chain,
    sde_steps,
    velocity_to_score,
)


def make(horizon: int = 1, hidden=(16, 16), seed: int = 0, **options) -> FlowPolicy:
    options = {"zero_init": False, **options}
    generator = torch.Generator().manual_seed(seed)
    return FlowPolicy(5, 3, hidden, horizon=horizon, generator=generator, **options)


def gaussian_velocity(x, t, mean, std):
    """Exact velocity towards N(mean, std^2) (GoRL oracle 12 in forward time)."""
    return mean + (t * std**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * std**2) * (x - t * mean)


def gaussian_field(mean, std, num_steps):
    return lambda x, step: gaussian_velocity(x, step / num_steps, mean, std)


def eager_sample(policy, observation, noise, num_steps):
    """The textbook loop: concatenate, call the network, step."""
    x = noise.flatten(1)
    for step in range(num_steps):
        time = torch.full((len(x), 1), step / num_steps)
        features = (policy.normalizer(observation), x, policy.net.embedding(time))
        x = x + policy.net.mlp(torch.cat(features, -1)) / num_steps
    return x.view_as(noise)


# -- sampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("shape", [(3,), (1, 3), (7, 3), (2, 7, 3)])
def test_zero_network_returns_the_noise_bit_for_bit(shape, solver):
    """GoRL oracle 10, flow matching."""
    noise = torch.randn(shape)
    policy = make(zero_init=True, solver=solver)
    assert torch.equal(policy.sample(torch.randn(*shape[:-1], 5), noise), noise)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("num_steps", [10, 3])
def test_fast_path_equals_the_eager_loop(horizon, num_steps, gradients):
    policy = make(horizon)
    policy.normalizer.update(2 * torch.randn(100, 5) + 1)
    observation, noise = torch.randn(8, 5), torch.randn(8, *policy.action_shape)
    with torch.set_grad_enabled(gradients):
        fast = policy.sample(observation, noise, num_steps=num_steps)
        expected = eager_sample(policy, observation, noise, num_steps)
    torch.testing.assert_close(fast, expected, rtol=0, atol=1e-6)


def test_sampling_overwrites_no_input():
    policy, observation, noise = make(), torch.randn(8, 5), torch.randn(8, 3)
    copies = observation.clone(), noise.clone()
    with torch.inference_mode():
        policy.sample(observation, noise)
    assert torch.equal(observation, copies[0])
    assert torch.equal(noise, copies[1])


def test_gradient_flows_through_the_sampler():
    policy, noise = make(), torch.randn(8, 3, requires_grad=True)
    policy.sample(torch.randn(8, 5), noise).square().sum().backward()
    assert noise.grad.abs().min() > 0
    assert all(parameter.grad.abs().max() > 0 for parameter in policy.parameters())


def test_noise_draws_share_their_observation():
    policy, observation, noise = make(), torch.randn(8, 5), torch.randn(6, 8, 3)
    together = policy.sample(observation, noise)
    for draw, expected in zip(noise, together, strict=True):
        torch.testing.assert_close(policy.sample(observation, draw), expected)


@pytest.mark.parametrize("num_steps", [1, 3, 10])
def test_point_mass_is_reached_exactly(num_steps):
    """GoRL oracle 11."""
    noise = torch.randn(100, dtype=torch.float64)
    end = integrate(
        lambda x, step: 0.7 + (0.7 * step / num_steps - x) / (1 - step / num_steps),
        noise,
        num_steps,
    )
    torch.testing.assert_close(end, torch.full_like(noise, 0.7))


@pytest.mark.parametrize(
    ("num_steps", "std", "gain"),
    [
        (10, 0.1, 0.0617),
        (10, 0.3, 0.2469),
        (10, 0.5, 0.4308),
        (10, 1.0, 0.8790),
        (100, 0.1, 0.0956),
        (100, 0.3, 0.2943),
        (100, 0.5, 0.4926),
        (100, 1.0, 0.9872),
    ],
)
def test_euler_contracts_a_gaussian_as_predicted(num_steps, std, gain):
    """GoRL oracle 12: the map is m + gain z; Euler's gain falls short of the exact std."""
    noise = torch.tensor([0.0, 1.0], dtype=torch.float64)
    offset, one = integrate(gaussian_field(0.5, std, num_steps), noise, num_steps).tolist()
    assert offset == pytest.approx(0.5, abs=1e-12)
    # The published 100-step gain of std 0.5 is 0.4926 in one source, 0.4927 in another.
    assert one - offset == pytest.approx(gain, abs=1.1e-4)


def test_heun_is_closer_to_the_exact_std_than_euler():
    noise = torch.tensor([0.0, 1.0], dtype=torch.float64)
    offset, one = integrate(gaussian_field(0.5, 0.3, 10), noise, 10, "heun").tolist()
    assert abs(one - offset - 0.3) < 0.01


def test_two_atoms_are_split_by_the_sign_of_the_noise():
    """GoRL oracle 14, analytic part."""

    def field(x, step):
        s = 1 - step / 10  # GoRL's reversed time
        return -(x - torch.tanh((1 - s) * x / s**2)) / s

    noise = torch.randn(1000, dtype=torch.float64)
    noise = noise[noise.abs() > 0.02]
    torch.testing.assert_close(integrate(field, noise, 10), noise.sign(), rtol=0, atol=1e-3)


def test_reversed_convention_gives_the_same_loss_and_sample():
    """GoRL oracle 16: t' = 1 - t and v' = -v."""
    policy = make()
    observation, action, noise = torch.randn(8, 5), torch.randn(8, 3), torch.randn(8, 3)
    time = torch.rand(8, 1)

    def reversed_velocity(x, t):
        return -policy.velocity(observation, x, 1 - t)

    t = 1 - time
    error = reversed_velocity(t * noise + (1 - t) * action, t) - (noise - action)
    loss, _ = policy.bc_loss(observation, action, noise, time)
    torch.testing.assert_close(loss, error.square().mean())
    x = noise
    for step in range(10):
        x = x - 0.1 * reversed_velocity(x, torch.full((8, 1), 1 - step / 10))
    torch.testing.assert_close(policy.sample(observation, noise), x, rtol=0, atol=1e-6)


def test_steps_equal_those_of_the_diffusers_scheduler():
    policy, observation, x = make(), torch.randn(8, 5), torch.randn(8, 3)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - step / 10 for step in range(10)])
    field, end = policy.field(observation), policy.sample(observation, x)
    with torch.no_grad():
        for step, timestep in enumerate(scheduler.timesteps):
            ours = integrate(lambda y, _, k=step: 0.1 * field(y, k), x, 1)
            x = scheduler.step(-field(x, step), timestep, x).prev_sample
            torch.testing.assert_close(ours, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(end, x, rtol=0, atol=1e-6)


# -- behaviour cloning ---------------------------------------------------------------------------


def test_bc_loss_is_the_flow_matching_error():
    policy, observation = make(2), torch.randn(8, 5)
    action, noise, time = torch.randn(8, 2, 3), torch.randn(8, 2, 3), torch.rand(8, 1)
    t = time.unsqueeze(-1)
    v = policy.velocity(observation, (1 - t) * noise + t * action, time)
    loss, metrics = policy.bc_loss(observation, action, noise, time)
    torch.testing.assert_close(loss, (v - (action - noise)).square().mean())
    assert metrics["loss/bc"] == loss


def test_bc_loss_of_a_zero_network_is_the_power_of_the_target():
    """GoRL oracle 13: 1 + s^2 + m^2."""
    generator = torch.Generator().manual_seed(0)
    action = 0.5 + 0.3 * torch.randn(100_000, 3, generator=generator)
    noise = torch.randn(action.shape, generator=generator)
    time = FlowPolicy.draw_time((100_000,), generator)
    loss, _ = make(zero_init=True).bc_loss(torch.zeros(100_000, 5), action, noise, time)
    assert loss.item() == pytest.approx(1 + 0.09 + 0.25, abs=0.02)


def test_several_draws_average_their_losses():
    policy, observation, action = make(), torch.randn(8, 5), torch.randn(8, 3)
    noise, time = torch.randn(4, 8, 3), torch.rand(4, 8, 1)
    loss, _ = policy.bc_loss(observation, action, noise, time)
    each = [policy.bc_loss(observation, action, noise[k], time[k])[0] for k in range(4)]
    torch.testing.assert_close(loss, torch.stack(each).mean())


@pytest.mark.parametrize("horizon", [1, 2])
def test_weight_zero_rows_may_hold_nan(horizon):
    policy, observation, time = make(horizon), torch.randn(4, 5), torch.rand(6, 4, 1)
    action = torch.randn(4, *policy.action_shape)
    noise = torch.randn(6, 4, *policy.action_shape)
    expected, _ = policy.bc_loss(observation[:3], action[:3], noise[:, :3], time[:, :3])
    action[3] = math.nan
    weight = torch.tensor([1.0, 1.0, 1.0, 0.0])
    weight = weight if horizon == 1 else weight.unsqueeze(-1)
    loss, _ = policy.bc_loss(observation, action, noise, time, weight=weight)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert all(parameter.grad.isfinite().all() for parameter in policy.parameters())


def test_chunk_weights_mask_single_steps():
    policy, observation, time = make(2), torch.randn(4, 5), torch.rand(4, 1)
    action, noise = torch.randn(4, 2, 3), torch.randn(4, 2, 3)
    t = time.unsqueeze(-1)
    v = policy.velocity(observation, (1 - t) * noise + t * action, time)
    error = (v - (action - noise)).square().mean(-1)
    weight = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    loss, _ = policy.bc_loss(observation, action, noise, time, weight=weight)
    kept = torch.cat((error[:, 0], error[[0, 2], 1]))
    # Masked actions are zeroed before they enter the network, so only whole kept rows agree.
    whole = policy.bc_loss(observation[[0, 2]], action[[0, 2]], noise[[0, 2]], time[[0, 2]])[0]
    torch.testing.assert_close(kept[[0, 2, 4, 5]].mean(), whole)
    zeroed = action * weight.unsqueeze(-1)
    v = policy.velocity(observation, (1 - t) * noise + t * zeroed, time)
    error = (v - (zeroed - noise)).square().mean(-1)
    torch.testing.assert_close(loss, (error * weight).sum() / weight.sum())


def test_trained_velocity_approaches_but_never_beats_the_irreducible_loss():
    """GoRL oracle 13: the floor for N(m, s^2) is pi s / 2, 0.471 at s = 0.3."""
    generator = torch.Generator().manual_seed(0)
    policy = FlowPolicy(1, 1, (32, 32), generator=generator)
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)

    def loss(rows: int) -> torch.Tensor:
        action = 0.5 + 0.3 * torch.randn(rows, 1, generator=generator)
        noise = torch.randn(rows, 1, generator=generator)
        time = policy.draw_time((rows,), generator)
        return policy.bc_loss(torch.zeros(rows, 1), action, noise, time)[0]

    for _ in range(400):
        optimizer.zero_grad()
        loss(256).backward()
        optimizer.step()
        schedule.step()
    floor = math.pi * 0.3 / 2
    with torch.no_grad():
        reached = sum(loss(20_000).item() for _ in range(20)) / 20  # standard error 0.001
    assert floor - 0.004 < reached < floor + 0.02


# -- scores --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "expected"), [(0.1, -0.824615), (0.5, -1.76), (0.9, -2.023529)])
def test_score_of_a_gaussian_has_the_published_values(t, expected):
    """OGPO oracle O1: target N(0.3, 0.5^2) at x = 0.7."""
    x = torch.tensor(0.7, dtype=torch.float64)
    score = velocity_to_score(gaussian_velocity(x, t, 0.3, 0.5), x, t)
    assert score.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("t", [0.2, 0.5, 0.8, 0.95])
def test_score_of_a_mixture_is_the_gradient_of_its_log_density(t):
    weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    mean = torch.tensor([[-1.0, 0.5], [0.8, -0.2]], dtype=torch.float64)
    std = torch.tensor([0.2, 0.4], dtype=torch.float64)
    spread = ((1 - t) ** 2 + t**2 * std**2).sqrt()

    def log_joint(x):
        normal = torch.distributions.Normal(t * mean, spread.unsqueeze(-1))
        return normal.log_prob(x.unsqueeze(-2)).sum(-1) + weight.log()

    x = torch.randn(50, 2, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(log_joint(x).logsumexp(-1).sum(), x)
    posterior = log_joint(x).softmax(-1).unsqueeze(-1)
    each = gaussian_velocity(x.unsqueeze(-2), t, mean, std.unsqueeze(-1))
    velocity = (posterior * each).sum(-2)
    torch.testing.assert_close(velocity_to_score(velocity, x, t), expected, rtol=1e-9, atol=1e-9)


def test_policy_score_and_denoised_follow_from_its_velocity():
    policy, observation = make(2), torch.randn(8, 5)
    x, time = torch.randn(8, 2, 3), 0.9 * torch.rand(8, 1)
    v, t = policy.velocity(observation, x, time), time.unsqueeze(-1)
    torch.testing.assert_close(policy.score(observation, x, time), (t * v - x) / (1 - t))
    torch.testing.assert_close(policy.denoised(observation, x, time), x + (1 - t) * v)


def test_score_at_time_one_is_finite_and_the_limit_for_an_exact_velocity():
    policy = FlowPolicy(1, 1, (), time_embedding_dim=1)
    x, one = torch.tensor([[0.3]]), torch.ones(1, 1)
    assert policy.score(torch.zeros(1, 1), x, one).isfinite().all()

    class Exact(torch.nn.Module):
        def forward(self, observation, x, time):
            return gaussian_velocity(x, time, 0.5, 0.2)

    policy.double().net = Exact()
    score = policy.score(torch.zeros(1, 1), x.double(), one.double())
    assert score.item() == pytest.approx(0.2 / 0.04, rel=0.005)


# -- the chain -----------------------------------------------------------------------------------


def chain_moments(num_steps, sigma, correction, mean=0.3, std=0.5):
    """Mean and variance of the last state; exact, since the chain is affine in all its draws."""
    basis = torch.cat((torch.zeros(1, num_steps + 1), torch.eye(num_steps + 1))).double()
    noise, draws = basis[:, :1], basis[:, 1:].unsqueeze(-1)
    steps = sde_steps(num_steps, sigma, correction)
    end = sde_chain(gaussian_field(mean, std, num_steps), noise, draws, steps)[:, -1, 0]
    return end[0].item(), (end[1:] - end[0]).square().sum().item()


@pytest.mark.parametrize(
    ("sigma", "correction", "variance"),
    [
        (0.0, "marginal", 0.18557),
        (0.05, "official", 0.19231),
        (0.05, "marginal", 0.18665),
        (0.05 / 10**0.5, "marginal", 0.18568),
        (0.5, "official", 0.76984),
        (0.5, "marginal", 0.24210),
        (0.5 / 10**0.5, "marginal", 0.19562),
    ],
)
def test_chain_moments_have_the_published_values(sigma, correction, variance):
    """OGPO oracle O2 at K = 10; sigma / sqrt(K) is its `continuous` convention."""
    mean, actual = chain_moments(10, sigma, correction)
    assert mean == pytest.approx(0.3, abs=1e-9)
    assert actual == pytest.approx(variance, abs=1e-5)


@pytest.mark.parametrize(
    ("sigma", "correction", "variance"),
    [(0.5, "marginal", 0.25239), (0.5 / 1000**0.5, "marginal", 0.24937), (0.5, "official", 64.2)],
)
def test_marginals_are_kept_as_steps_grow_unless_official(sigma, correction, variance):
    """OGPO oracle O2 at K = 1000; the target's variance is 0.25."""
    assert chain_moments(1000, sigma, correction)[1] == pytest.approx(variance, rel=1e-3)


def test_every_marginal_along_the_chain_is_that_of_the_flow():
    generator = torch.Generator().manual_seed(0)
    rows, num_steps = 20_000, 100
    noise = torch.randn(rows, 1, generator=generator)
    draws = torch.randn(rows, num_steps, 1, generator=generator)
    field = gaussian_field(0.3, 0.5, num_steps)
    states = sde_chain(field, noise, draws, sde_steps(num_steps, 0.1))[..., 0]
    t = torch.arange(num_steps + 1) / num_steps
    std = ((1 - t) ** 2 + t**2 * 0.25).sqrt()
    # Monte-Carlo error 0.007 std of the mean and 0.005 std of the std, plus the solver's.
    assert ((states.mean(0) - 0.3 * t) / std).abs().max() < 0.03
    assert (states.std(0) / std - 1).abs().max() < 0.03


@pytest.mark.parametrize("correction", ["marginal", "official", "none"])
def test_chain_log_prob_of_a_linear_network_agrees_with_torch_distributions(correction):
    policy = make(hidden=(), time_embedding_dim=2)
    observation, noise, draws = torch.randn(8, 5), torch.randn(8, 3), torch.randn(8, 4, 3)
    chain = policy.chain(observation, noise, draws, 0.3, correction=correction)
    weight, bias = policy.net.mlp.linears[0].weight, policy.net.mlp.linears[0].bias
    share = {"marginal": 0.5, "official": 0.125, "none": 0.0}[correction]
    expected = []
    for k in range(4):
        t, x = k / 4, chain[:, k]
        embedding = torch.tensor([math.cos(t), math.sin(t)]).expand(8, 2)
        v = torch.cat((observation, x, embedding), -1) @ weight.T + bias
        mean = x + v / 4 + share * 0.3**2 * (t * v - x)
        normal = torch.distributions.Normal(mean, 0.3 * math.sqrt(1 - t))
        expected.append(normal.log_prob(chain[:, k + 1]).sum(-1))
    actual = policy.chain_log_prob(observation, chain, 0.3, correction=correction)
    torch.testing.assert_close(actual, torch.stack(expected, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("sigma", [0.05, 0.3, [0.2, 0.1, 0.4]])
def test_rescoring_recovers_the_drawn_noise(sigma, clip, horizon):
    """OGPO oracle O3: sampler and scorer share schedule, correction, clip and time grid."""
    policy = make(horizon).double()
    observation = torch.randn(6, 8, 5, dtype=torch.float64)
    noise = torch.randn(6, 8, *policy.action_shape, dtype=torch.float64)
    draws = torch.randn(6, 8, 3, *policy.action_shape, dtype=torch.float64)
    chain = policy.chain(observation, noise, draws, sigma, clip=clip)
    assert chain.shape == (6, 8, 4, *policy.action_shape)
    stds = torch.tensor([step.std for step in sde_steps(3, sigma)], dtype=torch.float64)
    dims = 3 * horizon
    constant = dims * (stds.log() + 0.5 * math.log(2 * math.pi))
    expected = -0.5 * draws.reshape(6, 8, 3, dims).square().sum(-1) - constant
    actual = policy.chain_log_prob(observation, chain, sigma, clip=clip)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)


def test_deterministic_chain_is_the_ode_and_scores_zero():
    policy, observation, noise = make(), torch.randn(8, 5), torch.randn(8, 3)
    chain = policy.chain(observation, noise, torch.randn(8, 10, 3), 0.0)
    end = policy.sample(observation, noise)
    torch.testing.assert_close(chain[:, -1], end, rtol=0, atol=1e-6)
    assert torch.equal(policy.chain_log_prob(observation, chain, 0.0), torch.zeros(8, 10))


def test_chain_gradient_reaches_weights_through_the_velocity_only():
    policy, observation = make(), torch.randn(8, 5)
    with torch.no_grad():
        chain = policy.chain(observation, torch.randn(8, 3), torch.randn(8, 4, 3), 0.2)
    policy.chain_log_prob(observation, chain, 0.2).sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in policy.parameters())
    assert not chain.requires_grad


def test_chain_kl_of_a_shifted_velocity():
    """OGPO oracle O4: shift 0.02, K = 10, D = 28, sigma 0.05: KL 0.656089."""
    steps = sde_steps(10, 0.05, "none")
    kl = sum(28 * (step.gain * 0.02) ** 2 / (2 * step.std**2) for step in steps)
    assert kl == pytest.approx(0.656089, abs=1e-6)


def test_sigmas_must_match_the_steps():
    with pytest.raises(ConfigError, match="one per step, 4"):
        sde_steps(4, [0.1, 0.2])


# -- construction and state ----------------------------------------------------------------------


def test_seed_decides_weights_and_nothing_else_is_touched():
    before = torch.get_rng_state()
    first, second = make(seed=1).state_dict(), make(seed=1).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_reset_is_the_same_as_a_new_policy():
    policy = make(seed=1)
    policy.normalizer.update(torch.randn(10, 5))
    policy.reset(torch.Generator().manual_seed(2))
    expected = make(seed=2).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in policy.state_dict().items())


def test_observations_are_raw_at_the_boundary():
    policy, noise = make(), torch.randn(8, 3)
    observation = torch.randn(8, 5)
    expected = policy.sample(observation, noise)
    policy.normalizer.set_statistics(torch.full((5,), 100.0), torch.full((5,), 7.0))
    actual = policy.sample(100 + 7 * observation, noise)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{"solver": "rk4"}, {"num_steps": 0}, {"horizon": 0}, {"activation": "sine"}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        make(**options)
