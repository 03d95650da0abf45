"""The world model: encoder, dynamics, reward, critics, policy prior and what may stand beside them.

Architecture of TD-MPC2 (arXiv 2310.16828, section 3) and MBDPO (arXiv 2605.26282), both as in their
official codes, but for images: their convolutional encoder is not there, and observations are
vectors. Every network reads the task's embedding behind the latent state, where there are several
tasks, and then the action.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from genpol.nn.normed_mlp import INITIAL_STD, NormedEnsemble, NormedMLP
from genpol.nn.two_hot import TwoHot
from genpol.world_model.settings import ModelSize

_TIME_FEATURES = 64
_LARGEST_EMBEDDING = 1.0
_LOG_STD_RANGE = (-10.0, 2.0)


class Task(NamedTuple):
    """What rows of a batch are told of their tasks.

    Attributes:
        embedding: ``[B, d_e]``; ``None`` where there is one task.
        mask: Which action dimensions are in use, bool ``[B, A]``; ``None`` where all are.
        gamma: Discount per action, ``[]``, or ``[B]`` where there are several tasks.
    """

    embedding: Tensor | None
    mask: Tensor | None
    gamma: Tensor

    def repeat(self, number: int) -> Task:
        """Return the same for ``number`` rows on end in the place of each."""
        if self.embedding is None or self.mask is None:
            return self
        told = (self.embedding, self.mask, self.gamma)
        return Task(*(x.repeat_interleave(number, 0) for x in told))

    def tile(self, number: int) -> Task:
        """Return the same for all rows, ``number`` times over."""
        if self.embedding is None or self.mask is None:
            return self
        embedding, mask = (x.repeat(number, 1) for x in (self.embedding, self.mask))
        return Task(embedding, mask, self.gamma.repeat(number))

    def rows(self, index: Tensor) -> Task:
        """Return the same for the rows of these numbers only, int64 ``[R]``."""
        if self.embedding is None or self.mask is None:
            return self
        return Task(self.embedding[index], self.mask[index], self.gamma[index])

    def width(self, action_dim: int) -> Tensor:
        """Return how many of so many action dimensions are in use, ``[]`` or ``[B]``."""
        if self.mask is None:
            return self.gamma.new_tensor(float(action_dim))
        return self.mask.sum(-1).to(self.gamma.dtype)

    def hide(self, action: Tensor) -> Tensor:
        """Return actions ``[..., B, A]`` with zeros in dimensions that are not in use."""
        return action if self.mask is None else torch.where(self.mask, action, 0.0)

    def hide_plans(self, plans: Tensor) -> Tensor:
        """Return plans ``[B, ..., A]`` with zeros in dimensions that are not in use."""
        if self.mask is None:
            return plans
        mask = self.mask.view(len(self.mask), *(1,) * (plans.dim() - 2), -1)
        return torch.where(mask, plans, 0.0)


class PolicyDraw(NamedTuple):
    """A reparameterised action of the policy prior.

    Attributes:
        action: ``tanh(mean + std noise)``, ``[..., A]``.
        log_std: Before the tanh, ``[..., A]``.
    """

    action: Tensor
    log_std: Tensor


class ScoreNetwork(nn.Module):
    """Predicts the weighted mean of plans around a noisy one: the amortised search.

    ``Uhat(z, x_tau, tau)`` passes a tanh; the score follows as in
    :func:`~genpol.objectives.plan_search.plan_score`. MBDPO's released code predicts the score
    itself, whose squared error counts the cleanest level 17 900 times as much as the noisiest.

    Args:
        state_dim: Width of the latent state with the task's embedding.
        horizon: Actions H of a plan.
        action_dim: Width of an action.
        hidden: Width of both hidden layers.
        generator: Source of the initial weights.
    """

    frequencies: Tensor

    def __init__(
        self,
        state_dim: int,
        horizon: int,
        action_dim: int,
        hidden: int,
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        flat = horizon * action_dim
        self.net = NormedMLP(
            state_dim + flat + _TIME_FEATURES, flat, [hidden, hidden], generator=generator
        )
        half = _TIME_FEATURES // 2
        frequencies = (-math.log(1e4) / (half - 1) * torch.arange(half)).exp()
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, state: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """Return ``E[U | x_tau]``, ``[B, H, A]``.

        Args:
            state: Latents with embeddings, ``[B, L + d_e]``.
            noisy: ``x_tau``, ``[B, H, A]``.
            level: ``tau``, int64 ``[B]``.
        """
        angle = level.unsqueeze(-1) * self.frequencies
        inputs = torch.cat((state, noisy.flatten(1), angle.sin(), angle.cos()), dim=-1)
        return torch.tanh(self.net(inputs)).view_as(noisy)


class WorldModel(nn.Module):
    """All networks, as functions of latents ``[..., L]`` and actions ``[..., A]``.

    Args:
        observation_dim: Width of the observation.
        action_dim: Width of the action.
        size: Widths of the networks.
        horizon: Actions of a plan.
        gamma: Discount per action; one for each task.
        energy: Whether there is a classifier of behaviour.
        score: Whether there is a score network.
        episodic: Whether ends of episodes are predicted.
        simplex_dim: Width of the simplices of the latent state.
        scalar: How rewards and values become bins.
        action_dims: Dimensions in use of each task, the first ones; empty where there is one task,
            which uses all.
        task_dim: Width of a task's embedding.
        generator: Source of the initial weights.
    """

    gammas: Tensor
    masks: Tensor | None

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        size: ModelSize,
        *,
        horizon: int,
        gamma: tuple[float, ...],
        energy: bool = False,
        score: bool = False,
        episodic: bool = False,
        simplex_dim: int = 8,
        scalar: TwoHot | None = None,
        action_dims: tuple[int, ...] = (),
        task_dim: int = 96,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.action_dim = action_dim
        self.scalar = TwoHot() if scalar is None else scalar
        state = size.latent_dim
        told = task_dim if action_dims else 0
        hidden, bins = [size.mlp_dim] * 2, self.scalar.num_bins

        def net(reads: int, writes: int, *, group: int = 0, zero: bool = False) -> NormedMLP:
            return NormedMLP(
                reads, writes, hidden, group=group, zero_output=zero, generator=generator
            )

        pair = state + told + action_dim
        self.encoder = NormedMLP(
            observation_dim + told,
            state,
            [size.encoder_dim] * (size.encoder_layers - 1),
            group=simplex_dim,
            generator=generator,
        )
        self.dynamics = net(pair, state, group=simplex_dim)
        self.reward = net(pair, bins, zero=True)
        self.critics = NormedEnsemble(
            size.num_critics, pair, bins, hidden, zero_output=True, generator=generator
        )
        self.averaged = copy.deepcopy(self.critics).requires_grad_(False)
        self.policy = net(state + told, 2 * action_dim)
        self.energy = net(pair, 1, zero=True) if energy else None
        self.termination = net(state + told, 1) if episodic else None
        self.score = (
            ScoreNetwork(state + told, horizon, action_dim, size.mlp_dim, generator=generator)
            if score
            else None
        )
        self._add_tasks(gamma, action_dims, task_dim, generator)

    def _add_tasks(
        self,
        gamma: tuple[float, ...],
        action_dims: tuple[int, ...],
        task_dim: int,
        generator: torch.Generator | None,
    ) -> None:
        self.register_buffer("gammas", torch.tensor(gamma), persistent=False)
        self.tasks = None
        masks = None
        if action_dims:
            draws = torch.rand(
                len(action_dims),
                task_dim,
                generator=generator,
                device="cpu" if generator is None else generator.device,
            )
            self.tasks = nn.Parameter(INITIAL_STD * (2.0 * draws - 1.0))
            masks = torch.arange(self.action_dim) < torch.tensor(action_dims).unsqueeze(-1)
        self.register_buffer("masks", masks, persistent=False)

    def task(self, index: Tensor | None = None) -> Task:
        """Return what rows of these tasks are told.

        Args:
            index: Number of each row's task, int64 ``[B]``; ``None`` where there is one task.
        """
        if index is None or self.tasks is None or self.masks is None:
            return Task(None, None, self.gammas[0])
        return Task(self.tasks[index], self.masks[index], self.gammas[index])

    @staticmethod
    def state(latent: Tensor, task: Task) -> Tensor:
        """Return latents or observations with the embedding behind them, ``[..., B, L + d_e]``."""
        if task.embedding is None:
            return latent
        told = task.embedding.expand(*latent.shape[:-1], -1)
        return torch.cat((latent, told), dim=-1)

    def pair(self, latent: Tensor, action: Tensor, task: Task) -> Tensor:
        """Return what networks of state and action read, ``[..., B, L + d_e + A]``."""
        return torch.cat((self.state(latent, task), action), dim=-1)

    def encode(self, observation: Tensor, task: Task) -> Tensor:
        """Return latents of observations ``[..., B, d]``, ``[..., B, L]``."""
        latent: Tensor = self.encoder(self.state(observation, task))
        return latent

    def imagine(self, latent: Tensor, actions: Tensor, task: Task) -> Tensor:
        """Return the latents that actions ``[H, B, A]`` lead through, ``[H + 1, B, L]``."""
        latents = [latent]
        for action in actions.unbind(0):
            latents.append(self.dynamics(self.pair(latents[-1], action, task)))
        return torch.stack(latents)

    def act(self, latent: Tensor, noise: Tensor | None, task: Task) -> PolicyDraw:
        """Draw from the policy prior: ``tanh(mean + std noise)``, or its mode without noise.

        ``ln std = -10 + 6 (tanh(raw) + 1)`` (official code).

        Args:
            latent: ``[..., B, L]``.
            noise: ``[..., B, A]``.
            task: Of each row.
        """
        mean, raw = self.policy(self.state(latent, task)).chunk(2, dim=-1)
        low, high = _LOG_STD_RANGE
        log_std = low + 0.5 * (high - low) * (torch.tanh(raw) + 1.0)
        before = mean if noise is None else mean + log_std.exp() * noise
        return PolicyDraw(task.hide(torch.tanh(before)), log_std)

    def values(
        self,
        latent: Tensor,
        action: Tensor,
        task: Task,
        *,
        members: Tensor | None,
        averaged: bool = False,
        frozen: bool = False,
    ) -> Tensor:
        """Return decoded action values ``[M, ..., B]``.

        Args:
            latent: ``[..., B, L]``.
            action: ``[..., B, A]``.
            task: Of each row.
            members: Which critics, int64 ``[M]``; ``None`` for all.
            averaged: Ask the averaged copies.
            frozen: Let no gradient reach the critics.
        """
        critics = self.averaged if averaged else self.critics
        logits = critics(self.pair(latent, action, task), members=members, frozen=frozen)
        return self.scalar.decode(logits)

    @torch.no_grad()
    def follow(self, share: float) -> None:
        """Move the averaged critics towards the live ones, and embeddings back to norm 1 at most.

        Args:
            share: Of the way between the critics.
        """
        torch._foreach_lerp_(
            list(self.averaged.parameters()), list(self.critics.parameters()), share
        )
        if self.tasks is not None:
            self.tasks.copy_(torch.renorm(self.tasks, 2.0, 0, _LARGEST_EMBEDDING))
