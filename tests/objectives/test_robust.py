"""The worst of several models, one by one: IWOCS (surrogates specification, section 15)."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.testing import assert_close

from genpol.errors import ConfigError, NonFiniteError
from genpol.objectives.robust import pessimistic_value, worst_case_curriculum

vector = partial(torch.tensor, dtype=torch.float64)
NOMINAL, ADVERSE = (1.0, 0.6), (0.0, 0.5)


def solve_bandits(models, tolerance=0.0, **options):
    """Run the curriculum on bandits, whose model is the reward of each action."""

    def plan(solutions):
        values = pessimistic_value(torch.stack(solutions))
        return int(values.argmax()), float(values.max())

    return worst_case_curriculum(
        models,
        solve=vector,
        plan=plan,
        evaluate=lambda action, model: model[action],
        tolerance=tolerance,
        **options,
    )


# -- pessimistic values --------------------------------------------------------------------------


def test_pessimism_takes_the_least_value_of_each_action():
    assert_close(pessimistic_value(vector([NOMINAL, ADVERSE])), vector([0.0, 0.5]))


def test_values_without_support_do_not_count():
    values = vector([[1.0, 0.6, 3.0], [0.0, math.nan, 2.0]])
    support = torch.tensor([[True, True, False], [True, False, True]])
    assert_close(pessimistic_value(values, support), vector([0.0, 0.6, 2.0]))


def test_what_no_model_has_seen_is_taken_by_no_greedy_policy():
    values, support = vector([[9.0, -5.0]]), torch.tensor([[False, True]])
    assert pessimistic_value(values, support).tolist() == [-math.inf, -5.0]
    assert pessimistic_value(values, support, unsupported=0.0).tolist() == [0.0, -5.0]


def test_values_may_be_tables_and_pass_gradient():
    values = torch.randn(2, 4, 3, requires_grad=True)
    least = pessimistic_value(values, torch.ones(2, 4, 3, dtype=torch.bool))
    assert torch.equal(least, values.amin(0))
    least.sum().backward()
    assert torch.equal(values.grad, (values == values.amin(0)).float())


@pytest.mark.parametrize(
    ("values", "support"), [(torch.zeros(0, 3), None), (torch.zeros(2, 3), torch.ones(2).bool())]
)
def test_unusable_values_are_refused(values, support):
    with pytest.raises(ConfigError):
        pessimistic_value(values, support)


# -- the loop ------------------------------------------------------------------------------------


def test_two_bandits_are_solved_for_the_worst():
    found = solve_bandits([NOMINAL, ADVERSE])
    assert found.policy == 1  # the second action
    assert found.estimates == pytest.approx((1.0, 0.5))
    assert found.worst_values == pytest.approx((0.0, 0.5))
    assert found.models == (0, 1)
    assert found.iterations == 2
    assert found.converged
    assert_close(torch.stack(found.solutions), vector([NOMINAL, ADVERSE]))


def test_models_that_are_never_the_worst_are_not_solved():
    found = solve_bandits([NOMINAL, (0.5, 0.6), (5.0, 5.0), ADVERSE])
    assert found.models == (0, 3)
    assert found.policy == 1


def test_each_policy_meets_the_model_that_is_worst_for_it():
    models = [(1.0, 0.9, 0.8), (0.0, 0.9, 0.8), (1.0, 0.1, 0.7)]
    found = solve_bandits(models)
    assert found.models == (0, 1, 2)
    assert found.worst_values == pytest.approx((0.0, 0.1, 0.7))
    assert (found.policy, found.iterations, found.converged) == (2, 3, True)


@pytest.mark.parametrize(("tolerance", "models"), [(0.99, (0, 1)), (1.0, (0,))])
def test_a_loss_within_the_tolerance_is_taken(tolerance, models):
    # Under the adverse model the nominal policy loses 1.
    found = solve_bandits([NOMINAL, ADVERSE], tolerance)
    assert found.models == models
    assert found.converged


def test_it_stops_after_so_many_models_and_says_so():
    models = [(1.0, 0.9, 0.8), (0.0, 0.9, 0.8), (1.0, 0.1, 0.7)]
    found = solve_bandits(models, max_iterations=1)
    assert found.models == (0, 1)
    assert (found.iterations, found.converged) == (2, False)
    assert found.worst_values[-1] == pytest.approx(0.1)


def test_a_model_that_was_solved_is_not_solved_again():
    # A plan that promises more than its policy can hold, even under the nominal model.
    found = worst_case_curriculum(
        ["nominal"],
        solve=lambda model: model,
        plan=lambda solutions: ("policy", 1.0),
        evaluate=lambda policy, model: 0.0,
        tolerance=0.1,
    )
    assert (found.models, found.iterations, found.converged) == ((0,), 1, False)


@pytest.mark.parametrize(
    ("models", "options"),
    [([], {}), ([NOMINAL], {"tolerance": -1.0}), ([NOMINAL], {"max_iterations": -1})],
)
def test_unusable_arguments_are_refused(models, options):
    with pytest.raises(ConfigError):
        solve_bandits(models, **options)


def test_a_return_that_is_no_number_is_refused():
    with pytest.raises(NonFiniteError, match=r"models\[1\] is nan"):
        solve_bandits([NOMINAL, (math.nan, 0.5)])
