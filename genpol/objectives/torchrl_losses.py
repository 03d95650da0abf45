"""BPO, MDPO and R2VPO as torchrl loss modules, for scripts that use ``ClipPPOLoss``.

Each class takes what :class:`torchrl.objectives.ClipPPOLoss` takes, reads the same keys and returns
the same ones, so in a script on torchrl's collectors, ``GAE`` and replay buffers only the class
changes::

    from genpol.objectives.torchrl_losses import R2VPOLoss

    loss_module = R2VPOLoss(actor, critic, entropy_coeff=1e-4)  # was ClipPPOLoss(...)
    for batch in collector:
        for _ in range(epochs):
            advantage_module(batch)  # GAE
            buffer.extend(batch.reshape(-1))
            for _ in range(frames_per_batch // 64):
                losses = loss_module(buffer.sample(64))
                total = sum(losses[key] for key in losses.keys() if key.startswith("loss_"))
                total.backward()
                ...
            loss_module.step_multiplier()  # R2VPO only; without it the multiplier stays fixed

The formulas are the pure functions of :mod:`genpol.objectives.surrogates` and
:mod:`genpol.objectives.bpo`; the defaults are those of the agents. What differs from ClipPPOLoss:

- :class:`BPOLoss` takes ``clip_epsilon`` as its box and refuses ``normalize_advantage``; with a
  ``median_network`` there is one more term, ``loss_median``.
- :class:`MDPOLoss` needs the parameters of the distribution that collected (``loc`` and ``scale``),
  which a ``ProbabilisticActor`` leaves in the data, and a schedule: :meth:`MDPOLoss.set_step_size`.
- :class:`R2VPOLoss` has a dual variable: :meth:`R2VPOLoss.step_multiplier`.
- MDPO and R2VPO clip nothing: they take ``clip_epsilon``, warn, and report no ``clip_fraction``.
  Like ClipPPOLoss they leave the advantage as it is; standardise it with ``average_gae=True`` of
  GAE or ``normalize_advantage=True``, as genpol's agents do.
- Keywords that nobody knows are refused, while torchrl's classes swallow them.

With ``delay_actor`` the trust region lies around the proximal policy p (PPO-EWMA, arXiv 2110.00641)
and rows are weighted by ``p / b``, b the policy that collected, as ClipPPOLoss does it. What they
share is in :mod:`genpol.objectives.torchrl_base`; neither is imported by the package.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule, TensorDictModule, TensorDictParams
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import Distribution, kl_divergence
from torchrl.modules.distributions.utils import has_analytic_kl
from torchrl.objectives import PPOLoss

from genpol import settings as check
from genpol.errors import ConfigError
from genpol.objectives import surrogates
from genpol.objectives.bpo import bpo, bpo_target, soft_median_loss
from genpol.objectives.torchrl_base import SurrogateLoss, Tensors, Terms


class BPOLoss(SurrogateLoss):
    """Bounded policy optimisation: ``|A| |r - target|`` (arXiv 2604.18578).

    See :func:`~genpol.objectives.bpo.bpo` and :func:`~genpol.objectives.bpo.bpo_target`; the target
    of a row comes from its ``value_target`` minus the median, or minus the critic's value if there
    is no median. Advantages must not be standardised: weights and ``temperature`` are in
    units of the reward, and centring the advantage would give weight to rows that deserve none. So
    ``normalize_advantage`` and ``advantage_norm`` are refused; GAE's ``average_gae`` touches only
    ``weight="stored"``. ``clip_fraction`` is the share of ratios outside the box.
    As the loss has the reward's unit, scale rewards so that returns are of order 10.

    Args:
        actor_network: The policy, as for ClipPPOLoss.
        critic_network: The value network; it is needed also if it is trained elsewhere.
        median_network: Writes the soft median of the return, e.g. ``ValueOperator(net,
            in_keys=["observation"], out_keys=["state_median"])``; ``set_keys(median=...)`` names
            another key. Its loss reaches it alone: parameters that it shares with the actor
            or critic are left to those (if ``functional``).
        low: How far below 1 the target lies for actions worse than the median.
        high: How far above 1 for better ones.
        clip_epsilon: Sets ``low`` and ``high``, to the same number or as a pair.
        temperature: Advantage, in units of the return, over which the target runs from low to high.
        median_temperature: Width of the median's loss: 1 as released, 0 takes ``temperature``.
        median_coeff: Weight of the median's loss.
        huber: Radius around the target within which the loss is quadratic; 0 is the paper's.
        weight: ``online`` takes ``|value_target - value|`` with the critic as it is, ``stored`` the
            advantage in the data.
        **options: Other keywords of ClipPPOLoss.

    Raises:
        ConfigError: If an option is out of bounds, there is no critic, or advantages would be
            normalised.
    """

    @dataclass
    class _AcceptedKeys(PPOLoss._AcceptedKeys):
        """Adds ``median``, which the median network writes."""

        median: NestedKey = "state_median"

    default_keys = _AcceptedKeys
    clips = True
    _schedulable_buffers = frozenset({"median_coeff"})

    median_network: Any
    median_network_params: TensorDictParams
    target_median_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: TensorDictModule | None = None,
        critic_network: TensorDictModule | None = None,
        median_network: TensorDictModule | None = None,
        *,
        low: float = 0.2,
        high: float = 0.2,
        clip_epsilon: float | tuple[float, float] | None = None,
        temperature: float = 1e-3,
        median_temperature: float = 1.0,
        median_coeff: float = 1.0,
        huber: float = 0.0,
        weight: str = "online",
        **options: Any,
    ) -> None:
        if clip_epsilon is not None:
            low, high = clip_epsilon if isinstance(clip_epsilon, tuple) else (clip_epsilon,) * 2
        check.within("BPOLoss.low", low, 0.0, 1.0)
        check.positive("BPOLoss.high", high)
        check.at_least("BPOLoss.temperature", temperature, 0.0)
        check.at_least("BPOLoss.huber", huber, 0.0)
        check.one_of("BPOLoss.weight", weight, ("online", "stored"))
        median_temperature = median_temperature or temperature
        if median_network is not None:
            check.positive("BPOLoss.median_temperature", median_temperature)
        if options.get("normalize_advantage") or options.get("advantage_norm") is not None:
            raise ConfigError(
                "BPOLoss: normalize_advantage and advantage_norm spoil its weights: leave them out"
            )
        super().__init__(actor_network, critic_network, **options)
        if self.critic_network is None:
            raise ConfigError("BPOLoss: needs critic_network, whose value weighs the rows")
        self.low, self.high, self.temperature = low, high, temperature
        self.median_temperature, self.huber, self.weight = median_temperature, huber, weight
        self.register_coeff_buffer("median_coeff", median_coeff, device=self.entropy_coeff.device)
        self._add_median(median_network)
        self.own_keys = ("target_distance", *([] if median_network is None else ["loss_median"]))
        self._set_in_keys()

    def _add_median(self, network: TensorDictModule | None) -> None:
        if network is None or not self.functional:
            self.median_network = network
            return
        others = [*self.actor_network.parameters(), *self.critic_network.parameters()]
        self.convert_to_functional(network, "median_network", compare_against=others)

    def _set_in_keys(self) -> None:
        super()._set_in_keys()
        # torchrl calls it first while the median network is not there yet.
        if getattr(self, "median_network", None) is not None:
            self._in_keys = list({*(self._in_keys or []), *self.median_network.in_keys})

    def surrogate(self, terms: Terms) -> tuple[Tensors, Tensors]:
        """See :func:`~genpol.objectives.bpo.bpo` and ``soft_median_loss`` there."""
        returns = self._required(terms.data, self.tensor_keys.value_target, "run GAE first")
        returns = returns.detach()
        value = centre = self._value(terms.data)
        if returns.shape != value.shape:
            raise ConfigError(
                f"BPOLoss: value_target is {list(returns.shape)}, the value {list(value.shape)}: "
                "their difference would be an outer product; both need a last dimension of 1"
            )
        losses: Tensors = {}
        if self.median_network is not None:
            median = self._median(terms.data)
            centre = median.detach()
            rows = soft_median_loss(median, returns, temperature=self.median_temperature)
            losses["loss_median"] = self.median_coeff * rows
        target = bpo_target(
            terms.rows(returns - centre),
            low=1.0 - self.low,
            high=1.0 + self.high,
            temperature=self.temperature,
        )
        weight = terms.rows(returns - value) if self.weight == "online" else terms.advantage
        losses["loss_objective"] = bpo(
            terms.log_ratio, weight * terms.importance, target=target, huber=self.huber
        )
        ratio = terms.log_ratio.detach().exp()
        outside = (ratio < 1.0 - self.low) | (ratio > 1.0 + self.high)
        return losses, {
            "clip_fraction": outside.to(ratio.dtype).mean(),
            "target_distance": (ratio - target).abs().mean(),
        }

    @torch.no_grad()
    def _value(self, data: TensorDictBase) -> Tensor:
        # On a copy: the stored value is what `clip_value` clips to.
        with self._with_parameters("critic_network"):
            written = self.critic_network(data.clone(False))
        return self._required(written, self.tensor_keys.value, "name it with set_keys(value=...)")

    def _median(self, data: TensorDictBase) -> Tensor:
        # Detached, since actor and critic may have written features that it reads.
        with self._with_parameters("median_network"):
            written = self.median_network(data.detach())
        return self._required(written, self.tensor_keys.median, "name it with set_keys(median=...)")


class MDPOLoss(SurrogateLoss):
    """Mirror descent: ``-r A + KL(new || old) / step_size`` (on-policy MDPO, arXiv 2005.09814).

    See :func:`~genpol.objectives.surrogates.mdpo`. The divergence is closed where
    :func:`torch.distributions.kl_divergence` knows it, as for Gaussians, squashed or not, and
    categoricals. Elsewhere (truncated Gaussians, composites) each row's ``r log r - (r - 1)``
    estimates it, :func:`~genpol.objectives.surrogates.tsallis_divergence` of index 1.

    The buffer ``step_size`` is for a schedule: call :meth:`set_step_size` once per rollout, or
    assign a number, ``loss.step_size = 0.5``. The paper makes 10 full-batch steps on a rollout.

    Args:
        actor_network: The policy, as for ClipPPOLoss; it must leave its distribution's parameters
            in the data, as a ``ProbabilisticActor`` does.
        critic_network: The value network.
        step_size: Mirror step size until it is set.
        floor: Least one that :meth:`set_step_size` sets.
        schedule: ``genpol`` starts at 1; ``released`` is one iteration late, as the authors' code.
        per_dimension: Divide the divergence by the number of action dimensions.
        **options: Other keywords of ClipPPOLoss.

    Raises:
        ConfigError: If an option is out of bounds.
    """

    own_keys = ("kl", "step_size")
    _schedulable_buffers = frozenset({"step_size"})

    step_size: Any  # a buffer that takes numbers, too

    def __init__(
        self,
        actor_network: TensorDictModule | None = None,
        critic_network: TensorDictModule | None = None,
        *,
        step_size: float = 1.0,
        floor: float = 0.02,
        schedule: str = "genpol",
        per_dimension: bool = False,
        **options: Any,
    ) -> None:
        check.positive("MDPOLoss.step_size", step_size)
        check.within("MDPOLoss.floor", floor, 0.0, 1.0)
        check.one_of("MDPOLoss.schedule", schedule, ("genpol", "released"))
        super().__init__(actor_network, critic_network, **options)
        self.floor, self.schedule, self.per_dimension = floor, schedule, per_dimension
        device = self.entropy_coeff.device
        self.register_buffer("step_size", torch.tensor(float(step_size), device=device))

    def set_step_size(self, iteration: int, total: int) -> None:
        """Set the mirror step size of a rollout.

        See :func:`~genpol.objectives.surrogates.mdpo_step_size`.

        Args:
            iteration: Number of the rollout, from 0.
            total: Number of rollouts over which the step size falls from 1.
        """
        self.step_size = surrogates.mdpo_step_size(
            min(iteration, total - 1), total, form=self.schedule, floor=self.floor
        )

    def _set_in_keys(self) -> None:
        super()._set_in_keys()
        self._in_keys = list({*(self._in_keys or []), *self._distribution_keys()})

    def surrogate(self, terms: Terms) -> tuple[Tensors, Tensors]:
        """See :func:`~genpol.objectives.surrogates.mdpo`."""
        divergence = self._divergence(terms)
        scaled = divergence / self._action_dim(terms.data) if self.per_dimension else divergence
        rows = surrogates.mdpo(
            terms.log_ratio,
            terms.advantage * terms.importance,
            divergence=scaled,
            step_size=self.step_size,
        )
        return {"loss_objective": rows}, {
            "kl": divergence.detach().mean(),
            "step_size": self.step_size.clone(),
        }

    def _divergence(self, terms: Terms) -> Tensor:
        old = self._old_distribution(terms)
        if has_analytic_kl(terms.distribution, old):
            return terms.rows(kl_divergence(terms.distribution, old).unsqueeze(-1))
        # At index 1 the density itself plays no part, only its shape.
        density = torch.zeros_like(terms.log_ratio)
        estimate = surrogates.tsallis_divergence(terms.log_ratio, density, index=1.0)
        return terms.importance * estimate

    @torch.no_grad()
    def _old_distribution(self, terms: Terms) -> Distribution:
        if self.delay_actor:
            parameters = self.target_actor_network_params
            with parameters.to_module(self.actor_network, preserve_module_state=False):
                proximal: Distribution = self.actor_network.get_dist(terms.original.clone(False))
            return proximal
        for key in self._distribution_keys():
            self._required(
                terms.original, key, "the actor that collected must leave it there (out_keys)"
            )
        kept = terms.original.detach()
        old: Distribution = self.actor_network.build_dist_from_params(kept)
        return old

    def _distribution_keys(self) -> list[NestedKey]:
        """Return the keys of the distribution's parameters: what its module reads."""
        modules = [
            module
            for module in self.actor_network.modules()
            if isinstance(module, ProbabilisticTensorDictModule)
        ]
        if not modules:
            raise ConfigError("MDPOLoss: actor_network has no ProbabilisticTensorDictModule")
        return list(modules[-1].in_keys)

    def _action_dim(self, data: TensorDictBase) -> int:
        key = self.tensor_keys.action
        keys = key if isinstance(key, list) else [key]
        return sum(data.get(one).shape[-1] for one in keys)


class R2VPOLoss(SurrogateLoss):
    """Ratio-variance regularisation: ``-r A + multiplier ((r - 1)^2 - delta)`` (arXiv 2601.03320).

    See :func:`~genpol.objectives.surrogates.r2vpo`. At ratio 1 its gradient is the policy
    gradient, as PPO's. In training mode every forward pass adds its rows, but for masked ones, to
    the moment of which :meth:`step_multiplier` takes the mean. Multiplier and moment are buffers
    and so in ``state_dict``.

    Args:
        actor_network: The policy, as for ClipPPOLoss.
        critic_network: The value network.
        delta: Second central moment of the ratio that is allowed.
        multiplier: Lagrange multiplier at the start.
        rate: Dual step; 0 keeps the multiplier.
        maximum: Greatest multiplier.
        **options: Other keywords of ClipPPOLoss.

    Raises:
        ConfigError: If an option is out of bounds.
    """

    own_keys = ("ratio_variance", "multiplier")
    _schedulable_buffers = frozenset({"multiplier"})

    multiplier: Tensor
    moment_sum: Tensor
    moment_rows: Tensor

    def __init__(
        self,
        actor_network: TensorDictModule | None = None,
        critic_network: TensorDictModule | None = None,
        *,
        delta: float = 0.02,
        multiplier: float = 0.5,
        rate: float = 1.0,
        maximum: float = 50.0,
        **options: Any,
    ) -> None:
        check.positive("R2VPOLoss.delta", delta)
        check.at_least("R2VPOLoss.multiplier", multiplier, 0.0)
        check.at_least("R2VPOLoss.rate", rate, 0.0)
        check.at_least("R2VPOLoss.maximum", maximum, 0.0)
        super().__init__(actor_network, critic_network, **options)
        self.delta, self.rate, self.maximum = delta, rate, maximum
        device = self.entropy_coeff.device
        self.register_buffer("multiplier", torch.tensor(float(multiplier), device=device))
        self.register_buffer("moment_sum", torch.zeros((), device=device))
        self.register_buffer("moment_rows", torch.zeros((), device=device))

    @torch.no_grad()
    def step_multiplier(self) -> None:
        """Take the dual step on the moment since the last one; call it after every epoch.

        See :func:`~genpol.objectives.surrogates.r2vpo_multiplier`.

        Raises:
            ConfigError: If there were no rows since then.
        """
        if self.moment_rows == 0:
            raise ConfigError(
                "R2VPOLoss.step_multiplier: no rows since the last step; call it after an epoch of "
                "forward passes in training mode"
            )
        # Replaced, not written in place: a graph that is not yet differentiated holds the old one.
        self.multiplier = surrogates.r2vpo_multiplier(
            self.multiplier,
            self.moment_sum / self.moment_rows,
            delta=self.delta,
            rate=self.rate,
            maximum=self.maximum,
        )
        self.moment_sum.zero_()
        self.moment_rows.zero_()

    def surrogate(self, terms: Terms) -> tuple[Tensors, Tensors]:
        """See :func:`~genpol.objectives.surrogates.r2vpo`."""
        rows = surrogates.r2vpo(
            terms.log_ratio, terms.advantage, multiplier=self.multiplier, delta=self.delta
        )
        metrics = {"ratio_variance": self._moment(terms), "multiplier": self.multiplier.clone()}
        return {"loss_objective": terms.importance * rows}, metrics

    @torch.no_grad()
    def _moment(self, terms: Terms) -> Tensor:
        """Return the mean of ``(r - 1)^2`` over rows that count, and take note of it."""
        squares = terms.importance * torch.expm1(terms.log_ratio).square()
        total = self._reduce_loss(squares, terms.data, reduction="sum")
        number = self._reduce_loss(torch.ones_like(squares), terms.data, reduction="sum")
        if self.training:
            self.moment_sum.add_(total)
            self.moment_rows.add_(number)
        moment: Tensor = total / number.clamp_min(1.0)
        return moment
