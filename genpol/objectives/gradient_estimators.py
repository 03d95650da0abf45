"""Policy gradients with a memory: N-PG-IGT, HARPG and N-HARPG (Fatkhullin et al., 2302.01734).

Each keeps a running estimate d of the gradient at the parameters theta. As theta moves, the part of
d that stems from earlier points must be carried along, or it is biased:

* N-PG-IGT (implicit gradient transport) collects, and takes the gradient g, at a point ahead:
  ``d_t = (1 - eta_t) d_{t-1} + eta_t g(theta_t + (1 - eta_t) / eta_t (theta_t - theta_{t-1}))``.
  Where the gradient is linear in theta the transport is exact: without noise ``d_t`` is the
  gradient at ``theta_t``.
* HARPG adds the change of the gradient since the last step, by a Hessian at a random point between:
  ``d_t = (1 - eta_t) (d_{t-1} + H(between) (theta_t - theta_{t-1})) + eta_t g(theta_t)``.

Then ``theta_{t+1} = theta_t - gamma_t d_t``, divided by ``|d_t|`` in N-PG-IGT and N-HARPG, and
``d_0 = g_0``. There are no importance weights, and each batch serves for one gradient.

Ours:

* gradients are those of a loss and steps go down, where the paper goes up the return;
* the point ahead may be capped, because ``(1 - eta_t) / eta_t`` grows without bound;
* each parameter tensor may be normalised by itself;
* the released code of HARPG multiplies means over the batch of the gradient and of the score, the
  latter with the sign turned. :func:`hessian_vector_product` follows the paper: a product for each
  trajectory, with the score summed over its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from genpol.errors import CheckpointError, NonFiniteError
from genpol.settings import at_least, one_of, positive, within

Schedule: TypeAlias = Callable[[int], float]
"""A value for each iteration 0, 1, ..."""

Trajectories: TypeAlias = Callable[[], tuple[Tensor, Tensor]]
"""Surrogate losses and summed log-probabilities, ``[B]`` each, at the present parameters."""


def power_decay(initial: float, power: float) -> Schedule:
    """Return the schedule ``t -> initial (2 / (t + 2))^power``.

    Those of the paper (arXiv 2302.01734) are of this family:

    ========== ============================= =================================
    estimator  ``eta``                       ``gamma``
    ========== ============================= =================================
    N-PG-IGT   ``power_decay(1.0, 4 / 5)``   ``power_decay(gamma_0, 1.0)``
    HARPG      ``power_decay(1.0, 1.0)``     ``power_decay(gamma_0, 0.5)``
    N-HARPG    ``power_decay(1.0, 1.0)``     ``power_decay(gamma_0, 1.0)``
    ========== ============================= =================================
    """
    return lambda iteration: float(initial * (2.0 / (iteration + 2.0)) ** power)


def hessian_vector_product(
    surrogate: Tensor, log_prob: Tensor, parameters: Sequence[Tensor], vector: Sequence[Tensor]
) -> list[Tensor]:
    """Estimate the Hessian of the expected loss times a vector from on-policy trajectories.

    ``mean_i grad <grad Phi_i, v> + grad Phi_i <grad log p_i, v>`` (arXiv 2302.01734). The first
    term alone is the Hessian of the surrogate, which overlooks that the parameters also decide
    which trajectories come up. The estimate is unbiased where ``mean_i grad Phi_i`` is an unbiased
    gradient, and turns its sign with that of the surrogate.

    Args:
        surrogate: For each trajectory ``Phi_i = -sum_t Psi_t log pi(a_t | s_t)``, ``[B]``, for
            advantages ``Psi`` that carry no gradient.
        log_prob: For each trajectory ``log p_i = sum_t log pi(a_t | s_t)``, ``[B]``: the sum over
            its steps, not their mean, and not negated.
        parameters: What both depend on, by operations that torch differentiates twice; a compiled
            module is not among them.
        vector: Tensors of the shapes of the parameters.

    Returns:
        Tensors of the shapes of the parameters.
    """
    gradient = torch.autograd.grad(
        surrogate.mean(), parameters, create_graph=True, materialize_grads=True
    )
    # The gradient of the mean, plus each trajectory's surrogate weighted by its score along v: one
    # more differentiation yields both terms, without a loop over trajectories.
    weighted = _score_along(log_prob, parameters, vector) * surrogate
    return list(
        torch.autograd.grad(
            _inner(gradient, vector) + weighted.mean(), parameters, materialize_grads=True
        )
    )


class _MomentumEstimator:
    """What the estimators share: iteration, last parameters, momentum, and the step along it."""

    def __init__(
        self, parameters: Iterable[Tensor], eta: Schedule, gamma: Schedule, normalize: str
    ) -> None:
        self._parameters = list(parameters)
        self._eta_schedule = eta
        self._gamma_schedule = gamma
        self._normalize = normalize
        self._previous = [parameter.detach().clone() for parameter in self._parameters]
        self._momentum = [torch.zeros_like(parameter) for parameter in self._previous]
        self.iteration = 0

    def state_dict(self) -> dict[str, Any]:
        """Return iteration, previous parameters and momentum, in tensors that no step changes."""
        return {
            "iteration": self.iteration,
            "previous": list(self._previous),
            "momentum": list(self._momentum),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the next step is then the same to the bit.

        The parameters themselves are restored by whoever owns them.

        Raises:
            CheckpointError: If the state is that of other parameters.
        """
        shapes = [list(parameter.shape) for parameter in self._parameters]
        for name in ("previous", "momentum"):
            saved = [list(tensor.shape) for tensor in state[name]]
            if saved != shapes:
                raise CheckpointError(
                    f"{type(self).__name__}: in the checkpoint {name!r} has shapes {saved}, here "
                    f"the parameters have {shapes}; use the settings it was saved with"
                )
        self._previous = self._copied(state["previous"])
        self._momentum = self._copied(state["momentum"])
        self.iteration = state["iteration"]

    def _copied(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        pairs = zip(tensors, self._parameters, strict=True)
        return [tensor.to(parameter, copy=True) for tensor, parameter in pairs]

    @property
    def _eta(self) -> float:
        if self.iteration == 0:
            return 1.0  # the first momentum is the first gradient, d_0 = g_0, at theta_0
        eta = self._eta_schedule(self.iteration)
        positive("eta", eta)
        within("eta", eta, 0.0, 1.0)
        return eta

    @torch.no_grad()
    def _displacement(self) -> list[Tensor]:
        """Return ``theta_t - theta_{t-1}``."""
        pairs = zip(self._parameters, self._previous, strict=True)
        return [now - before for now, before in pairs]

    @torch.no_grad()
    def _update(self, carried: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        """Mix the gradients into the momentum carried to this point and step against it."""
        eta, gamma = self._eta, self._gamma_schedule(self.iteration)
        at_least("gamma", gamma, 0.0)
        momentum = [d.lerp(g, eta) for d, g in zip(carried, gradients, strict=True)]
        norm = nn.utils.get_total_norm(momentum)
        if not torch.isfinite(norm):
            raise NonFiniteError(
                f"{type(self).__name__}: the gradient estimate is not finite in iteration "
                f"{self.iteration}; lower the step size, look for extreme observations and rewards"
            )
        steps = self._normalized(momentum, norm)
        self._previous = [parameter.detach().clone() for parameter in self._parameters]
        self._momentum = momentum
        for parameter, step in zip(self._parameters, steps, strict=True):
            parameter.sub_(step, alpha=gamma)
        self.iteration += 1
        return {
            "policy/grad_norm": nn.utils.get_total_norm(gradients),
            "policy/momentum_norm": norm,
        }

    def _normalized(self, momentum: list[Tensor], norm: Tensor) -> list[Tensor]:
        if self._normalize == "none":
            return momentum
        if self._normalize == "global":
            return [_divided(d, norm) for d in momentum]
        # With L tensors of length 1 / sqrt(L) the whole step has length 1 here too.
        scale = len(momentum) ** 0.5
        return [_divided(d, d.norm() * scale) for d in momentum]


class NPGIGT(_MomentumEstimator):
    """Normalised policy gradient with implicit gradient transport (N-PG-IGT, arXiv 2302.01734).

    In each iteration::

        with estimator.look_ahead():            # the parameters are those ahead
            batch = collect()                   # by the policy ahead
            gradients = torch.autograd.grad(loss(batch), parameters)
        metrics = estimator.step(gradients)     # from where the parameters were before

    The whole step has length ``gamma(t)``, whatever the size of the gradient.

    Args:
        parameters: What to optimise; changed in place.
        eta: Weight of the new gradient, in (0, 1]; the paper's is ``power_decay(1.0, 4 / 5)``.
        gamma: Length of the step; the paper's is ``power_decay(gamma_0, 1.0)``.
        max_look_ahead: Bound on ``(1 - eta) / eta``, ours; ``math.inf`` for none. Where it binds,
            the momentum is carried less far than theta moved.
        normalize: ``"global"`` divides by the norm over all parameters; ``"layer"``, ours for deep
            networks, by that of each tensor and the root of their number.

    Attributes:
        iteration: Steps taken.

    Raises:
        ConfigError: If the cap or ``normalize`` is out of bounds; later, if ``eta(t)`` or
            ``gamma(t)`` is.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        eta: Schedule,
        gamma: Schedule,
        max_look_ahead: float = 5.0,
        normalize: Literal["global", "layer"] = "global",
    ) -> None:
        at_least("max_look_ahead", max_look_ahead, 0.0, infinite=True)
        one_of("normalize", normalize, ("global", "layer"))
        super().__init__(parameters, eta, gamma, normalize)
        self._max_look_ahead = max_look_ahead

    @contextmanager
    def look_ahead(self) -> Iterator[None]:
        """Move the parameters to the extrapolated point; put them back, to the bit, at the end.

        Differentiate inside: torch refuses a graph whose parameters have changed since.
        """
        stretch = min(1.0 / self._eta - 1.0, self._max_look_ahead)
        pairs = zip(self._parameters, self._displacement(), strict=True)
        with _parameters_at(self._parameters, [p.detach() + stretch * v for p, v in pairs]):
            yield

    def step(self, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        """Take one step with gradients of the loss at the point ahead.

        Returns:
            ``policy/grad_norm`` and ``policy/momentum_norm``, the latter that of ``d_t``.

        Raises:
            NonFiniteError: If the new estimate is not finite; nothing has changed then.
        """
        return self._update(self._momentum, gradients)


class HARPG(_MomentumEstimator):
    """Hessian-aided recursive policy gradient, HARPG or N-HARPG (arXiv 2302.01734).

    In each iteration, with a trainer's ``generator`` and two batches::

        fraction = torch.rand((), generator=generator)
        correction = estimator.hessian_correction(trajectories, fraction)
        gradients = torch.autograd.grad(trajectories()[0].mean(), parameters)
        metrics = estimator.step(gradients, correction)

    ``trajectories()`` collects with the policy as it is at the call and returns, for each
    trajectory, the surrogate loss and the summed log-probability, as
    :func:`hessian_vector_product` takes them. Gradient and correction must be of the same loss, in
    scale too.

    Args:
        parameters: What to optimise; changed in place.
        eta: Weight of the new gradient, in (0, 1]; the paper's is ``power_decay(1.0, 1.0)``.
        gamma: Step size; the paper's is ``power_decay(gamma_0, 0.5)``, normalised
            ``power_decay(gamma_0, 1.0)``.
        normalize: ``"none"`` is HARPG, ``"global"`` N-HARPG; ``"layer"`` as in :class:`NPGIGT`.

    Attributes:
        iteration: Steps taken.

    Raises:
        ConfigError: If ``normalize`` is none of these; later, if ``eta(t)`` or ``gamma(t)`` is out
            of bounds.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        eta: Schedule,
        gamma: Schedule,
        normalize: Literal["none", "global", "layer"],
    ) -> None:
        one_of("normalize", normalize, ("none", "global", "layer"))
        super().__init__(parameters, eta, gamma, normalize)

    @contextmanager
    def between(self, fraction: float | Tensor) -> Iterator[None]:
        """Move the parameters to a point of the last step; put them back, to the bit, at the end.

        For trainers that collect here first, and call :meth:`hessian_correction` later.

        Args:
            fraction: Of the way from ``theta_{t-1}`` to ``theta_t``.
        """
        pairs = zip(self._previous, self._displacement(), strict=True)
        with _parameters_at(self._parameters, [before + fraction * v for before, v in pairs]):
            yield

    def hessian_correction(
        self, trajectories: Trajectories, fraction: float | Tensor
    ) -> list[Tensor]:
        """Estimate how much the gradient changed with the last step.

        Calls ``trajectories`` once, with the parameters moved to
        ``theta_{t-1} + fraction (theta_t - theta_{t-1})``, and puts them back to the bit. Before
        the first step the answer is zero and nothing is called.

        Args:
            trajectories: See the class.
            fraction: A fresh draw from the uniform distribution on [0, 1].

        Returns:
            Tensors of the shapes of the parameters.
        """
        if self.iteration == 0:
            return [torch.zeros_like(parameter) for parameter in self._previous]
        displacement = self._displacement()
        with self.between(fraction):
            return hessian_vector_product(*trajectories(), self._parameters, displacement)

    def step(self, gradients: Sequence[Tensor], correction: Sequence[Tensor]) -> dict[str, Tensor]:
        """Take one step with gradients of the loss at the parameters as they are.

        Args:
            gradients: Tensors of the shapes of the parameters.
            correction: What :meth:`hessian_correction` returned since the last step.

        Returns:
            ``policy/grad_norm`` and ``policy/momentum_norm``, the latter that of ``d_t``.

        Raises:
            NonFiniteError: If the new estimate is not finite; nothing has changed then.
        """
        pairs = zip(self._momentum, correction, strict=True)
        return self._update([d + v for d, v in pairs], gradients)


@contextmanager
def _parameters_at(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Put ``values`` into the parameters for the duration of the block."""
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        _assign(parameters, values)
        yield
    finally:
        _assign(parameters, saved)


@torch.no_grad()
def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _score_along(
    log_prob: Tensor, parameters: Sequence[Tensor], vector: Sequence[Tensor]
) -> Tensor:
    """Return ``<grad log p_i, v>`` for each trajectory, ``[B]``, without a graph.

    Backward passes give ``sum_i u_i <grad log p_i, v>``, which is linear in u; its derivative with
    respect to u is what we want.
    """
    u = torch.zeros_like(log_prob, requires_grad=True)
    gradient = torch.autograd.grad(
        log_prob, parameters, grad_outputs=u, create_graph=True, materialize_grads=True
    )
    return torch.autograd.grad(_inner(gradient, vector), u)[0]


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _divided(direction: Tensor, norm: Tensor) -> Tensor:
    """Return ``direction / norm``, zero where the norm is."""
    return torch.where(norm > 0, direction / norm, 0.0)
