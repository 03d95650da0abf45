"""The density of the data, as its gradients; and which action leads from one state to another.

**Denoising score matching** (Vincent 2011; over several levels: Song & Ermon 2019). With
``y = (s, a)`` standardised, coordinate by coordinate, and ``e ~ N(0, I)``, the minimiser of
``E |G(y + sigma e, sigma) + e / sigma|^2`` is the gradient of the log-density of y blurred by
``sigma``. Weighted by ``sigma^2`` that is a regression on a target of unit variance: the network
predicts ``P = sigma G``, whose target is ``-e``.

**Units.** ``sigma`` is in units of the data's spread k. What leaves this module is in raw units:
gradients are ``G / k``, displacements ``sigma^2 G k``. By Tweedie's formula (Efron 2011) y plus its
displacement is the mean of the clean samples that noise may have turned into y; a step of that
size cannot overshoot a Gaussian, whatever its spread.

**Which density** (``noise_on``). ``joint``: noise on state and action, the gradient of
``log p(s, a)``, whose action block is blurred over neighbouring states. ``action``: noise on the
action alone, the gradient of ``log p(a | s)`` at exactly that state, and no state block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from genpol import settings as check
from genpol.nn.masked import weighted_mean
from genpol.nn.mlp import MLP
from genpol.nn.normalizer import SMALLEST_STD
from genpol.policies.denoiser import Denoiser

NOISE_ON = ("joint", "action")

# Of the spread of a coordinate; that of one that hardly varies must not become a huge factor.
_SMALLEST_SCALE = 1e-3
# One-step differences below this share of their coordinate's spread are float32's rounding.
_SMALLEST_DIFFERENCE = 1e-6
# Waves of up to 8 rad over all levels together: the quicker ones of a wider embedding would turn
# more than once between two levels of training, and say nothing of those in between.
_TIME_EMBEDDING_DIM = 8


class Denoising(NamedTuple):
    """Where the denser data lie, seen from states and actions ``[...]``.

    Attributes:
        state: Displacement ``sigma^2 G_s k_s`` to the denoised state, ``[..., d]``; ``None`` for a
            model that has noise on actions only.
        action: Displacement ``sigma^2 G_a k_a`` to the denoised action, ``[..., A]``.
        support: Length of the whole displacement in standardised units, over ``sigma``: ``[...]``.
            Of a sample of the blurred data it is about 1 for each direction in which they are
            narrower than ``sigma``, in root mean square.
    """

    state: Tensor | None
    action: Tensor
    support: Tensor


class Score(Protocol):
    """What gives the gradient of a log-density of states and actions."""

    def denoise(self, observation: Tensor, action: Tensor, sigma: float) -> Denoising:
        """Return displacements at raw ``[..., d]`` and ``[..., A]`` for noise of level sigma."""
        ...


class Standardizer(nn.Module):
    """Fixed mean and scale of each coordinate; constant coordinates are left out.

    A coordinate that is constant in the data reads 0 whatever value it takes later: the weights
    behind it have learned nothing. It has scale 1.

    Args:
        dim: Number of coordinates.
    """

    mean: Tensor
    scale: Tensor
    varies: Tensor
    fitted: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(dim))
        self.register_buffer("varies", torch.ones(dim, dtype=torch.bool))
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def set_statistics(
        self,
        mean: Tensor,
        std: Tensor,
        *,
        smallest: float = _SMALLEST_SCALE,
        constant: float | Tensor = SMALLEST_STD,
    ) -> None:
        """Fix mean and standard deviation ``[dim]``.

        Args:
            mean: Mean of the data.
            std: Standard deviation of the data.
            smallest: Scales are at least that.
            constant: A coordinate of a spread up to this counts as constant.
        """
        varies = std > constant
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(varies, std.clamp_min(smallest), 1.0))
        self.varies.copy_(varies)
        self.fitted.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(x - mean) / scale`` of ``[..., dim]``, 0 where the data are constant."""
        return torch.where(self.varies, (x - self.mean) / self.scale, 0.0)


class DenoisingScore(nn.Module):
    """The gradient of the log-density of states and actions, blurred at several levels.

    The network is an MLP (SiLU, layer norm, last layer zero at first) that is told the level as
    ``u = (log sigma - log min) / (log max - log min)``, so that any ``sigma`` between the lowest
    and the highest level can be asked for. It knows nothing of the data's scale before
    :meth:`set_statistics`.

    Args:
        observation_dim: Width d of the state.
        action_dim: Width A of the action.
        hidden: Widths of the hidden layers.
        noise_on: ``joint`` or ``action``; see the module.
        num_levels: Levels L of training, geometric.
        max_noise: The highest, in standardised units.
        min_noise: The lowest.
        activation: See :class:`~genpol.nn.mlp.MLP`.
        layer_norm: See :class:`~genpol.nn.mlp.MLP`.
        init: See :class:`~genpol.nn.mlp.MLP`.
        generator: Source of the initial weights.

    Attributes:
        levels: The levels, highest first, ``[L]``.
        noise_dim: Width of the noise: d + A, or A for ``action``.
    """

    levels: Tensor

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        *,
        noise_on: str = "joint",
        num_levels: int = 10,
        max_noise: float = 0.5,
        min_noise: float = 0.02,
        activation: str = "silu",
        layer_norm: str = "before",
        init: str = "lecun",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check.one_of("noise_on", noise_on, NOISE_ON)
        check.at_least("num_levels", num_levels, 1)
        check.positive("min_noise", min_noise)
        check.at_least("max_noise", max_noise, min_noise)
        self.noise_on = noise_on
        self.max_noise = max_noise
        self.min_noise = min_noise
        self._clean_dim = observation_dim if noise_on == "action" else 0
        self._action_dim = action_dim
        self.noise_dim = observation_dim + action_dim - self._clean_dim
        self.standardizer = Standardizer(observation_dim + action_dim)
        self.network = Denoiser(
            self._clean_dim,
            self.noise_dim,
            hidden,
            time_embedding_dim=_TIME_EMBEDDING_DIM,
            activation=activation,
            layer_norm=layer_norm,
            init=init,
            generator=generator,
        )
        steps = torch.linspace(0.0, 1.0, num_levels, dtype=torch.float64)
        levels = max_noise * (min_noise / max_noise) ** steps
        self.register_buffer("levels", levels.float(), persistent=False)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Fix mean and standard deviation of the data's (state, action), ``[d + A]`` each."""
        self.standardizer.set_statistics(mean, std)

    def loss(
        self, observation: Tensor, action: Tensor, noise: Tensor, level: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``mean |P(y + sigma e, sigma) + e|^2`` over coordinates that vary, and metrics.

        It is 1 for a network that knows nothing.

        Args:
            observation: Raw states ``[B, d]``.
            action: Raw actions ``[B, A]``.
            noise: Standard normal e, ``[B, noise_dim]``.
            level: Indices into :attr:`levels`, int64 ``[B]``.
        """
        clean, noised = self._parts(observation, action)
        varies = self.standardizer.varies[self._clean_dim :]
        noise = torch.where(varies, noise, 0.0)
        sigma = self.levels[level].unsqueeze(-1)
        predicted = self.network(clean, noised + sigma * noise, self._position(sigma))
        loss = weighted_mean((predicted + noise).square(), varies)
        return loss, {"loss/score": loss.detach()}

    def denoise(self, observation: Tensor, action: Tensor, sigma: float) -> Denoising:
        """See :class:`Score`.

        Raises:
            ConfigError: If ``sigma`` lies outside the levels of training.
        """
        predicted = self._predict(observation, action, sigma)
        moved = sigma * predicted * self._scale
        state, action = moved.split([moved.shape[-1] - self._action_dim, self._action_dim], dim=-1)
        support = torch.linalg.vector_norm(predicted, dim=-1)
        return Denoising(state if self.noise_on == "joint" else None, action, support)

    def displacement(
        self, observation: Tensor, action: Tensor, sigma: float
    ) -> tuple[Tensor | None, Tensor]:
        """Return ``sigma^2 G k`` in raw units, of state and action; see :class:`Denoising`."""
        return self.denoise(observation, action, sigma)[:2]

    def support_distance(self, observation: Tensor, action: Tensor, sigma: float) -> Tensor:
        """Return the length of the standardised displacement over ``sigma``, ``[...]``."""
        return self.denoise(observation, action, sigma).support

    def score(
        self, observation: Tensor, action: Tensor, sigma: float
    ) -> tuple[Tensor | None, Tensor]:
        """Return the gradient ``G / k`` of the log-density in raw units, of state and action.

        It is 0 in coordinates that are constant in the data.
        """
        gradient = self._predict(observation, action, sigma) / (sigma * self._scale)
        state = gradient[..., : -self._action_dim] if self.noise_on == "joint" else None
        return state, gradient[..., -self._action_dim :]

    def mean_action(self, observation: Tensor) -> Tensor:
        """Return the mean action of the data ``[..., A]`` for states ``[..., d]``."""
        mean = self.standardizer.mean[-self._action_dim :]
        return mean.expand(*observation.shape[:-1], -1)

    @property
    def _scale(self) -> Tensor:
        return self.standardizer.scale[self._clean_dim :]

    def _predict(self, observation: Tensor, action: Tensor, sigma: float) -> Tensor:
        """Return P at raw states and actions, 0 in constant coordinates."""
        # The levels are powers computed in turn: their ends may miss the bounds by a rounding.
        slack = 1e-6 * sigma
        check.within("noise_level", sigma, self.min_noise - slack, self.max_noise + slack)
        clean, noised = self._parts(observation, action)
        at = torch.full_like(noised[..., :1], sigma)
        predicted: Tensor = self.network(clean, noised, self._position(at))
        return torch.where(self.standardizer.varies[self._clean_dim :], predicted, 0.0)

    def _parts(self, observation: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return the standardised coordinates without noise, and those that have it."""
        observation = observation.expand(*action.shape[:-1], -1)
        y: Tensor = self.standardizer(torch.cat((observation, action), dim=-1))
        return y[..., : self._clean_dim], y[..., self._clean_dim :]

    def _position(self, sigma: Tensor) -> Tensor:
        """Return u of levels: 0 for the lowest, 1 for the highest, by their logarithms."""
        if self.max_noise == self.min_noise:
            return torch.zeros_like(sigma)
        return (sigma / self.min_noise).log() / math.log(self.max_noise / self.min_noise)


class InverseDynamics(nn.Module):
    """The action that leads from a state to the next, ``J(s, s')`` in [-1, 1].

    It reads the standardised state and the *difference* of the two, which is small against a
    state's spread and therefore standardised by its own. For dynamics ``s' = A s + B a`` with a
    little isotropic noise it approaches ``B^+ (s' - A s)``, also for s' that no action leads to.

    Args:
        observation_dim: Width d of a state.
        action_dim: Width A of an action.
        hidden: Widths of the hidden layers.
        activation: See :class:`~genpol.nn.mlp.MLP`.
        layer_norm: See :class:`~genpol.nn.mlp.MLP`.
        init: See :class:`~genpol.nn.mlp.MLP`.
        generator: Source of the initial weights.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden: Sequence[int],
        *,
        activation: str = "relu",
        layer_norm: str = "none",
        init: str = "lecun",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.state = Standardizer(observation_dim)
        self.difference = Standardizer(observation_dim)
        self.net = MLP(
            2 * observation_dim,
            action_dim,
            hidden,
            activation=activation,
            layer_norm=layer_norm,
            init=init,
            generator=generator,
        )

    def set_statistics(
        self, mean: Tensor, std: Tensor, difference_mean: Tensor, difference_std: Tensor
    ) -> None:
        """Fix the statistics ``[d]`` of states, and of the differences from one to the next."""
        self.state.set_statistics(mean, std)
        # No floor of their own: positions move by a thousandth of their spread in a step, or less.
        self.difference.set_statistics(
            difference_mean,
            difference_std,
            smallest=0.0,
            constant=_SMALLEST_DIFFERENCE * self.state.scale,
        )

    def forward(self, observation: Tensor, following: Tensor) -> Tensor:
        """Return actions ``[..., A]`` for raw states ``[..., d]`` and those behind them."""
        seen = (self.state(observation), self.difference(following - observation))
        action: Tensor = self.net(torch.cat(seen, dim=-1))
        return action.tanh()

    def loss(
        self, observation: Tensor, following: Tensor, action: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared error of actions, and metrics.

        Rows that did not move at all are left out: in some data sets (D4RL without next
        observations) the state behind a task's end is a copy of the last one, which says nothing
        of the dynamics.

        Args:
            observation: Raw states ``[B, d]``.
            following: The next ones ``[B, d]``.
            action: Actions ``[B, A]`` between them.
        """
        error = (self(observation, following) - action).square().mean(-1)
        loss = weighted_mean(error, (following != observation).any(-1))
        return loss, {"loss/inverse_dynamics": loss.detach()}
