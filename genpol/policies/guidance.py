"""Guidance at test time: a trained generative policy bent towards what a critic likes.

Wrappers, and what they wrap, have ``sample(observation, noise)``; so they nest:
``BestOf(GuidedPolicy(flow, value, weight=0.04), value)``.

**Where the gradient is taken** (``estimator``; the variants of Q-Guided Flow, arXiv 2606.11087). At
each step the network's output gives a clean estimate ``a_hat = E[a | x_t]`` of the action:

============ ===================================================================================
``denoised`` ``grad Q(a_hat)``: QGF. The Jacobian ``d a_hat / dx`` is taken as the identity.
``jacobian`` ``J^T grad Q(a_hat)``, J through network and clip: the true gradient of Q(a_hat).
``noisy``    ``grad Q(x_t)``: the critic is asked far from any action (QFQL).
``rollout``  ``grad Q`` at the end of the remaining steps, Jacobian taken as the identity.
``bptt``     The gradient of that Q with respect to ``x_t``, through the remaining steps.
============ ===================================================================================

``rollout`` and ``bptt`` follow the sampler's own remaining steps, not the exact flow: with ten of
them, N(0, std^2) data for std = 1, 0.5, 0.1 and a Q of slope 1, ``bptt`` at weight 1 shifts the
mean by 1.3788, 0.6589, 0.0789, where the gradient through the exact flow, to which it tends with
the number of steps, shifts it by 1.4773, 0.7235, 0.1211.

The gradient times ``weight`` is added to the velocity of a flow. A step then moves the clean
estimate by ``(1 - t) weight grad Q``, which is what it does to a diffusion model, whose time is the
share of signal in x (ours; the paper has flows only).

``weight`` is not an inverse temperature: the exact velocity of the law ``p(a) exp(w Q(a))`` has the
factor ``(1 - t) / t`` and the Jacobian, and QGF has neither. It carries the units of
``action^2 / value`` and must be chosen anew when rewards are rescaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from genpol import settings as check
from genpol.errors import ConfigError
from genpol.policies.denoiser import Field, flatten_chunk, unflatten_chunk
from genpol.policies.diffusion import DiffusionPolicy, denoise, transition_mean
from genpol.policies.flow import FlowPolicy
from genpol.policies.schedules import DenoisingStep

Value = Callable[[Tensor, Tensor], Tensor]
"""Values ``[..., B]`` of observations ``[B, d]`` and actions ``[..., B, A]`` or ``[..., H, A]``."""

Gradient = Callable[[Tensor], Tensor]
"""The gradient of a value at flattened actions, of their shape."""

ESTIMATORS = ("denoised", "jacobian", "noisy", "rollout", "bptt")


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """Guidance at test time."""

    weight: float = 0.0
    """Factor on the critic's gradient, in action^2 / value; 0 for none."""
    best_of: int = 1
    """Samples per decision, of which the critic's favourite is taken."""
    estimator: str = "denoised"
    """Where the gradient is taken: `denoised` (QGF), `jacobian`, `noisy` (QFQL), `rollout` or
    `bptt`."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        check.at_least("guidance.weight", self.weight, 0.0)
        check.at_least("guidance.best_of", self.best_of, 1)
        check.one_of("guidance.estimator", self.estimator, ESTIMATORS)


class Sampler(Protocol):
    """What guidance wraps, and is."""

    @property
    def action_shape(self) -> tuple[int, ...]:
        """Trailing shape of actions and noise."""
        ...

    def sample(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Return actions of the shape of ``noise``."""
        ...


def gradient_of(value: Callable[[Tensor], Tensor]) -> Gradient:
    """Return the gradient of ``value`` with respect to its argument, row by row.

    Values are summed, not averaged, so that a row's gradient does not depend on the others. Freeze
    the critic's parameters (``requires_grad_(False)``) to spare their gradients.
    """

    def gradient(action: Tensor) -> Tensor:
        with torch.enable_grad():
            point = action.detach().requires_grad_()
            (slope,) = torch.autograd.grad(value(point).sum(), point)
        return slope

    return gradient


def guided_sample(
    field: Field,
    steps: Sequence[DenoisingStep],
    gradient: Gradient,
    noise: Tensor,
    *,
    weight: float | Sequence[float],
    estimator: str = "denoised",
    clip: float | None = 1.0,
    clean_clip: float | None = None,
    draws: Sequence[Tensor] | None = None,
) -> Tensor:
    """Run the sampling steps from ``noise`` ``[..., D]`` with guidance; nothing is clipped at last.

    Args:
        field: The network's output at each step.
        steps: Of a flow or a diffusion model.
        gradient: Of the value, at actions ``[..., D]``.
        noise: Initial state.
        weight: Factor on the gradient, or one for each step.
        estimator: See the module.
        clip: Bound on the actions that the critic is asked about, whose gradient passes the bound
            unchanged except with ``jacobian`` and ``bptt`` (as the released code); ``None`` for
            none.
        clean_clip: Bound on the clean estimate in the step itself, as the policy has it.
        draws: Noise of the steps, ``[..., D]`` each, for samplers that have it.
    """
    check.one_of("guidance.estimator", estimator, ESTIMATORS)
    weights = [float(weight)] * len(steps) if isinstance(weight, float | int) else list(weight)
    if len(weights) != len(steps):
        raise ConfigError(f"guidance.weight has {len(weights)} entries: must have {len(steps)}")
    push = _Push(field, steps, gradient, clip, clean_clip)
    x = noise
    for index, step in enumerate(steps):
        output, slope = getattr(push, estimator)(x, index)
        shift = weights[index] * (1.0 - step.time) / step.clean_o
        x = transition_mean(x, output + shift * slope, step, clean_clip)
        if draws is not None:
            x = x + step.std * draws[index]
    return x


@dataclass(frozen=True)
class _Push:
    """The estimators: each returns the network's output at x and the direction to push into."""

    field: Field
    steps: Sequence[DenoisingStep]
    gradient: Gradient
    clip: float | None
    clean_clip: float | None

    def denoised(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        output = self.field(x, index)
        return output, self.gradient(self._clipped(self._clean(x, output, index)))

    def noisy(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        return self.field(x, index), self.gradient(x)

    def jacobian(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            output = self.field(point, index)
            clean = self._clipped(self._clean(point, output, index))
            return output.detach(), self._pulled_back(clean, point)

    def rollout(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        output = self.field(x, index)
        return output, self.gradient(self._clipped(self._end(x, output, index)))

    def bptt(self, x: Tensor, index: int) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            output = self.field(point, index)
            end = self._clipped(self._end(point, output, index))
            return output.detach(), self._pulled_back(end, point)

    def _pulled_back(self, action: Tensor, point: Tensor) -> Tensor:
        """Return ``(d action / d point)^T grad Q(action)``."""
        (slope,) = torch.autograd.grad(action, point, self.gradient(action))
        return slope

    def _clean(self, x: Tensor, output: Tensor, index: int) -> Tensor:
        step = self.steps[index]
        return step.clean_x * x + step.clean_o * output

    def _end(self, x: Tensor, output: Tensor, index: int) -> Tensor:
        """Return where the steps left lead, without guidance and noise."""
        x = transition_mean(x, output, self.steps[index], self.clean_clip)
        for later in range(index + 1, len(self.steps)):
            x = transition_mean(x, self.field(x, later), self.steps[later], self.clean_clip)
        return x

    def _clipped(self, action: Tensor) -> Tensor:
        return action if self.clip is None else action.clamp(-self.clip, self.clip)


def classifier_free(conditional: Field, unconditional: Field, weight: float) -> Field:
    """Return ``u + weight (c - u)`` of two networks on one grid (arXiv 2207.12598; CFGRL).

    0 is the unconditional one, 1 the conditional one; above 1 the condition is exaggerated.
    """

    def field(x: Tensor, step: int) -> Tensor:
        return torch.lerp(unconditional(x, step), conditional(x, step), weight)

    return field


def ascend(action: Tensor, gradient: Gradient, *, step_size: float, num_steps: int) -> Tensor:
    """Return ``action`` after steps ``a <- clip(a + step_size grad Q(a), -1, 1)`` (GradStep)."""
    for _ in range(num_steps):
        action = (action + step_size * gradient(action)).clamp(-1.0, 1.0)
    return action


def best_of(candidates: Tensor, scores: Tensor) -> Tensor:
    """Return each row's candidate of the highest score; of equals, the first.

    Args:
        candidates: Actions ``[N, B, ...]``.
        scores: ``[N, B]``.
    """
    rows = torch.arange(candidates.shape[1], device=candidates.device)
    return candidates[scores.argmax(0), rows]


class ClassifierFreePolicy(nn.Module):
    """A conditional flow or diffusion policy whose condition is exaggerated.

    Args:
        policy: Trained with the condition in its observation, and now and then without.
        without: Takes the condition out of observations ``[..., d]``.
        weight: See :func:`classifier_free`.
    """

    def __init__(
        self,
        policy: FlowPolicy | DiffusionPolicy,
        without: Callable[[Tensor], Tensor],
        *,
        weight: float,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.without = without
        self.weight = weight
        self.horizon = policy.horizon
        self.action_shape = policy.action_shape
        self.clip = _clean_clip(policy)

    def field(self, observation: Tensor) -> Field:
        """Return the combined network on the sampler's grid."""
        conditional = self.policy.field(observation)
        if self.weight == 1.0:
            return conditional
        unconditional = self.policy.field(self.without(observation))
        return classifier_free(conditional, unconditional, self.weight)

    def sampling_steps(self) -> list[DenoisingStep]:
        """Return the policy's steps."""
        return self.policy.sampling_steps()

    @torch.no_grad()
    def sample(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Return actions of the shape of ``noise``; at weight 1 they are the policy's."""
        if self.weight == 1.0:
            return self.policy.sample(observation, noise)
        flat = flatten_chunk(noise, self.horizon)
        states = denoise(self.field(observation), flat, self.sampling_steps(), clip=self.clip)
        return unflatten_chunk(states[-1], self.horizon)


class GuidedPolicy(nn.Module):
    """A flow or diffusion policy whose steps are pushed up a critic's gradient.

    The critic is not trained here, and no gradient of the policy's weights is kept.

    Args:
        policy: What is guided; it may have a classifier-free weight of its own.
        value: The critic. Its parameters should not require gradients.
        weight: See :class:`GuidanceSettings`; at 0 samples are the policy's, bit for bit.
        estimator: See the module.
    """

    def __init__(
        self,
        policy: FlowPolicy | DiffusionPolicy | ClassifierFreePolicy,
        value: Value,
        *,
        weight: float,
        estimator: str = "denoised",
    ) -> None:
        super().__init__()
        check.one_of("guidance.estimator", estimator, ESTIMATORS)
        self.policy = policy
        self.value = value
        self.weight = weight
        self.estimator = estimator
        self.action_shape = policy.action_shape

    @torch.no_grad()
    def sample(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Return actions of the shape of ``noise``, within [-1, 1] if they are guided."""
        policy = self.policy
        if self.weight == 0.0:
            return policy.sample(observation, noise)

        def value(flat: Tensor) -> Tensor:
            return self.value(observation, unflatten_chunk(flat, policy.horizon))

        flat = guided_sample(
            policy.field(observation),
            policy.sampling_steps(),
            gradient_of(value),
            flatten_chunk(noise, policy.horizon),
            weight=self.weight,
            estimator=self.estimator,
            clean_clip=_clean_clip(policy),
        )
        return unflatten_chunk(flat.clamp(-1.0, 1.0), policy.horizon)


def _clean_clip(policy: FlowPolicy | DiffusionPolicy | ClassifierFreePolicy) -> float | None:
    return None if isinstance(policy, FlowPolicy) else policy.clip


class BestOf(nn.Module):
    """Of several samples of a policy, the one that a critic values most.

    Args:
        policy: What draws the samples.
        value: The critic.
    """

    def __init__(self, policy: Sampler, value: Value) -> None:
        super().__init__()
        self.policy = policy
        self.value = value
        self.action_shape: tuple[int, ...] = policy.action_shape

    @torch.no_grad()
    def sample(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Return actions ``[B, ...]``, one for each observation ``[B, d]``.

        Args:
            observation: Raw observations.
            noise: N draws for each, ``[N, B, A]`` or ``[N, B, H, A]``. One of nothing but a batch,
                ``[B, ...]``, is a sample of the policy.
        """
        if noise.ndim == 1 + len(self.action_shape):
            return self.policy.sample(observation, noise)
        candidates = self.policy.sample(observation, noise).clamp(-1.0, 1.0)
        return best_of(candidates, self.value(observation, candidates))
