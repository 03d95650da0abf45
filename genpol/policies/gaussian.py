"""Diagonal Gaussian policy, without squashing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genpol.nn.masked import weighted_mean
from genpol.nn.mlp import MLP
from genpol.nn.normalizer import RunningNormalizer
from genpol.policies.denoiser import clean_rows


class GaussianPolicy(nn.Module):
    """``a ~ N(mean(s), scale^2)``, with a scale for each state or one for all.

    A scale for each state is ``clip(softplus(raw(s)) + min_scale)``, one for all is ``exp`` of a
    vector of parameters, as in most code for PPO.

    It shares the verbs of the generative policies (see :mod:`genpol.policies`), as a chain of one
    step. Squashing, where wanted, belongs to the environment.

    Args:
        observation_dim: Width of the observation.
        action_dim: Width of the action.
        hidden: Widths of the hidden layers.
        activation: See :class:`~genpol.nn.mlp.MLP`.
        min_scale: Smallest standard deviation; below 1.
        max_scale: Largest standard deviation.
        state_dependent_scale: Whether there is a scale for each state; one for all begins at 1.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        *,
        activation: str = "silu",
        min_scale: float = 1e-3,
        max_scale: float = 10.0,
        state_dependent_scale: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.action_shape = (action_dim,)
        self.num_steps = 1
        self.min_scale = min_scale
        self.max_scale = max_scale
        self.normalizer = RunningNormalizer(observation_dim)
        self.log_scale = None if state_dependent_scale else nn.Parameter(torch.zeros(action_dim))
        outputs = 2 * action_dim if state_dependent_scale else action_dim
        self.net = MLP(observation_dim, outputs, hidden, activation=activation, generator=generator)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and scale, ``[..., A]`` each."""
        return self.at_normalized(self.normalizer(observation))

    def at_normalized(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and scale at observations that went through ``normalizer`` before."""
        output: Tensor = self.net(observation)
        if self.log_scale is not None:
            scale = self.log_scale.exp().clamp(self.min_scale, self.max_scale)
            return output, scale.expand_as(output)
        mean, raw = output.chunk(2, dim=-1)
        return mean, (F.softplus(raw) + self.min_scale).clamp(max=self.max_scale)

    def sample(self, observation: Tensor, noise: Tensor) -> Tensor:
        """Return ``mean + scale * noise``, ``[..., A]``."""
        mean, scale = self(observation)
        return mean + scale * noise

    def mode(self, observation: Tensor) -> Tensor:
        """Return the mean, ``[..., A]``."""
        mean: Tensor = self(observation)[0]
        return mean

    @staticmethod
    def draw_time(
        shape: Sequence[int], generator: torch.Generator, device: torch.device | str | None = None
    ) -> Tensor:
        """Return ones ``[*shape, 1]``: a Gaussian has no path, only its end."""
        return torch.ones((*shape, 1), device=device or generator.device)

    def bc_loss(
        self,
        observation: Tensor,
        action: Tensor,
        noise: Tensor | None = None,
        time: Tensor | None = None,
        *,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the negative log-likelihood of ``action`` ``[..., A]``, averaged over rows.

        Args:
            observation: Raw observations ``[..., d]``.
            action: Targets.
            noise: Ignored; here so that all policies are called alike.
            time: Ignored.
            weight: Weight of each row ``[...]``; rows of weight zero may hold NaN actions.
        """
        mean, scale = self(observation)
        loss = -weighted_mean(log_prob(mean, scale, clean_rows(action, weight)), weight)
        return loss, {"loss/bc": loss.detach()}

    def score(self, observation: Tensor, action: Tensor, time: Tensor | None = None) -> Tensor:
        """Return the gradient of the log-density at ``action``; ``time`` is ignored (always 1)."""
        mean, scale = self(observation)
        return (mean - action) / scale.square()

    def chain(
        self,
        observation: Tensor,
        noise: Tensor,
        step_noise: Tensor,
        sigma: float | None = None,
    ) -> Tensor:
        """Return the one-step chain ``[..., 2, A]``: ``noise``, then the action.

        The single transition ``N(mean, scale^2)`` does not depend on ``noise``; it consumes
        ``step_noise`` ``[..., 1, A]``. ``sigma`` is ignored: the scale is learned.
        """
        action = self.sample(observation, step_noise[..., 0, :])
        return torch.stack((noise.expand_as(action), action), dim=-2)

    def chain_log_prob(
        self, observation: Tensor, chain: Tensor, sigma: float | None = None
    ) -> Tensor:
        """Return the log-density of the chain's one transition, ``[..., 1]``."""
        mean, scale = self(observation)
        return log_prob(mean, scale, chain[..., 1, :]).unsqueeze(-1)

    @torch.no_grad()
    def reset_to_prior(self) -> None:
        """Make the policy N(0, I) at every observation by zeroing the last layer.

        The scale's bias becomes ``log(expm1(1 - min_scale))``, which softplus takes to
        ``1 - min_scale`` (GoRL, "re-initialise at the prior").
        """
        last = self.net.linears[-1]
        last.weight.zero_()
        if self.log_scale is not None:
            last.bias.zero_()
            self.log_scale.zero_()
            return
        mean_bias, raw_bias = last.bias.chunk(2)
        mean_bias.zero_()
        raw_bias.fill_(math.log(math.expm1(1.0 - self.min_scale)))

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew and forget the observation statistics."""
        self.net.reset_parameters(generator)
        if self.log_scale is not None:
            self.log_scale.data.zero_()
        self.normalizer.reset()


def log_prob(mean: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """Return ``log N(x; mean, diag(scale)^2)`` summed over the last dimension."""
    standard = (x - mean) / scale
    density = -0.5 * standard.square() - scale.log() - 0.5 * math.log(2 * math.pi)
    return density.sum(-1)


def entropy(mean: Tensor, scale: Tensor) -> Tensor:
    """Return the differential entropy of ``N(mean, diag(scale)^2)`` over the last dimension."""
    return (scale.log() + 0.5 + 0.5 * math.log(2 * math.pi)).expand_as(mean).sum(-1)


def gaussian_kl(mean: Tensor, scale: Tensor, old_mean: Tensor, old_scale: Tensor) -> Tensor:
    """Return ``KL(N(mean, scale^2) || N(old_mean, old_scale^2))`` summed over the last dimension.

    ``log(s_old / s) + (s^2 + (m - m_old)^2) / (2 s_old^2) - 1/2`` per dimension: new against old,
    the direction of mirror descent (arXiv 2005.09814), opposite to TRPO's.
    """
    spread = (scale.square() + (mean - old_mean).square()) / (2 * old_scale.square())
    return (old_scale.log() - scale.log() + spread - 0.5).sum(-1)
