"""What the torchrl loss modules share: all of ``ClipPPOLoss`` but the surrogate.

It builds on internals of torchrl 0.14's ``PPOLoss``.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from tensordict.nn import TensorDictModule, dispatch
from tensordict.utils import NestedKey
from torch import Tensor
from torch.distributions import Distribution
from torchrl.objectives import PPOLoss
from torchrl.objectives.ppo import _broadcast_advantage_to_log_weight, _check_advantage_broadcast
from torchrl.objectives.utils import _sum_td_features

from genpol.errors import ConfigError, nearest
from genpol.objectives import surrogates

Tensors = dict[str, Any]
"""Tensors by key; the entropies of a composite action are a TensorDict."""


@dataclass(frozen=True)
class Terms:
    """What one forward pass offers a surrogate, rows ``[..., 1]``.

    Attributes:
        data: A shallow copy of the input, which holds what the networks and the estimator wrote.
        original: The input itself, which the present actor has not written into.
        distribution: That of the present actor; carries gradient, as does ``log_ratio``.
        log_ratio: Against the proximal policy, which collected unless ``delay_actor``; clamped.
        importance: Density ratio of the proximal to the collecting policy; constants, mostly 1.
        advantage: Normalised if the options say so.
    """

    data: TensorDictBase
    original: TensorDictBase
    distribution: Distribution
    log_ratio: Tensor
    importance: Tensor
    advantage: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """Give ``x`` the shape of ``log_ratio``: one ratio per token repeats its decision's value.

        Raises:
            ValueError: If the trailing dimension is missing, which would make an outer product.
        """
        return _rows(x, self.log_ratio)


class SurrogateLoss(PPOLoss):
    """Everything of ClipPPOLoss but the surrogate, which :meth:`surrogate` supplies.

    Args:
        actor_network: The policy, as for ClipPPOLoss.
        critic_network: The value network.
        **options: Other keywords of :class:`torchrl.objectives.PPOLoss`.

    Raises:
        ConfigError: If a keyword is unknown, or ``clip_value=True``, which has no radius to take.
    """

    clips: ClassVar[bool] = False
    """Whether there is a ``clip_fraction``."""
    own_keys: tuple[str, ...] = ()
    """What :meth:`surrogate` returns beside it and ``loss_objective``."""
    _in_keys: list[Any] | None
    _out_keys: list[Any] | None

    def __init__(
        self,
        actor_network: TensorDictModule | None = None,
        critic_network: TensorDictModule | None = None,
        **options: Any,
    ) -> None:
        name = type(self).__name__
        if options.pop("clip_epsilon", None) is not None:
            warnings.warn(f"{name} clips nothing: clip_epsilon has no effect", stacklevel=3)
        known = inspect.signature(PPOLoss.__init__).parameters
        for option in options:
            if option not in known:
                raise ConfigError(f"{name}: no keyword {option!r}.{nearest(option, known)}")
        if options.get("clip_value") is True:
            raise ConfigError(f"{name}: clip_value = True: give the radius, such as 0.2")
        options["clip_value"] = options.get("clip_value") or None
        super().__init__(actor_network, critic_network, **options)

    @abstractmethod
    def surrogate(self, terms: Terms) -> tuple[Tensors, Tensors]:
        """Return rows ``[..., 1]`` of ``loss_objective`` and of own losses, and scalars to log."""

    @property
    def out_keys(self) -> list[Any]:
        """Keys of the result: ClipPPOLoss's in its order, then the surrogate's own."""
        if self._out_keys is None:
            self._out_keys = [
                "loss_objective",
                *(["clip_fraction"] if self.clips else []),
                *(["entropy", "loss_entropy"] if self.entropy_bonus else []),
                *(["loss_critic"] if self._has_critic else []),
                *(["value_clip_fraction"] if self.clip_value else []),
                *("ESS", "kl_approx", "max_ratio", "mean_ratio"),
                *self.own_keys,
            ]
        return self._out_keys

    @out_keys.setter
    def out_keys(self, values: list[Any] | None) -> None:
        self._out_keys = values

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return losses, reduced as ``reduction`` says, and scalars to log.

        Args:
            tensordict: Rows of a rollout. Without an advantage, the value estimator makes it.
        """
        data = tensordict.clone(False)
        advantage = self._advantage(data)
        shape = advantage.shape[:-1]
        log_weight, distribution, kl_approx, log_importance = self._log_weight(data, shape)
        if log_importance is None:
            log_importance = torch.zeros_like(log_weight)
        terms = Terms(
            data=data,
            original=tensordict,
            distribution=distribution,
            log_ratio=_clamped(log_weight),
            importance=_clamped(log_importance).exp(),
            advantage=_rows(advantage, log_weight),
        )
        losses, metrics = self.surrogate(terms)
        metrics["kl_approx"] = kl_approx.detach().mean()
        metrics |= _ratio_metrics((log_weight + log_importance).detach())
        for more in (self._entropy_terms(distribution, shape), self._critic_terms(data)):
            losses |= more[0]
            metrics |= more[1]
        reduced = {key: self._reduce_loss(x, data).squeeze(-1) for key, x in losses.items()}
        return TensorDict(reduced | metrics)

    def _advantage(self, data: TensorDictBase) -> Tensor:
        advantage = data.get(self.tensor_keys.advantage, None)
        missing = advantage is None
        if missing:
            if self.critic_network is None:
                raise ConfigError(
                    f"{type(self).__name__}: no {self.tensor_keys.advantage!r} in the data, and no "
                    "critic_network to estimate it: run GAE first"
                )
            self.value_estimator(
                data,
                params=self._cached_critic_network_params_detached,
                target_params=self.target_critic_network_params,
            )
            advantage = data.get(self.tensor_keys.advantage)
        return self._maybe_normalize_advantage(advantage, data, update_norm=missing)

    def _entropy_terms(
        self, distribution: Distribution, shape: torch.Size
    ) -> tuple[Tensors, Tensors]:
        if not self.entropy_bonus:
            return {}, {}
        entropy = self._get_entropy(distribution, adv_shape=shape)
        metrics: Tensors = {}
        total = entropy
        if is_tensor_collection(entropy):
            metrics["composite_entropy"] = entropy.detach()
            total = _sum_td_features(entropy)
        metrics["entropy"] = total.detach().mean()
        return {"loss_entropy": self._weighted_loss_entropy(entropy)}, metrics

    def _critic_terms(self, data: TensorDictBase) -> tuple[Tensors, Tensors]:
        if not self._has_critic:
            return {}, {}
        loss, clip_fraction, explained_variance = self.loss_critic(data)
        metrics = {"value_clip_fraction": clip_fraction, "explained_variance": explained_variance}
        return {"loss_critic": loss}, {k: x for k, x in metrics.items() if x is not None}

    def _with_parameters(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """Put the parameters of a network in place, from where ``functional`` took them."""
        if not self.functional:
            return contextlib.nullcontext()
        parameters, network = getattr(self, f"{name}_params"), getattr(self, name)
        manager: contextlib.AbstractContextManager[Any] = parameters.to_module(
            network, preserve_module_state=False
        )
        return manager

    def _required(self, data: TensorDictBase, key: NestedKey, remedy: str) -> Any:
        x = data.get(key, None)
        if x is None:
            raise ConfigError(f"{type(self).__name__}: no {key!r} in the data: {remedy}")
        return x


def _clamped(log_ratio: Tensor) -> Tensor:
    return surrogates.clamped_log_ratio(log_ratio, torch.zeros_like(log_ratio))


def _rows(x: Tensor, log_ratio: Tensor) -> Tensor:
    expanded: Tensor = _broadcast_advantage_to_log_weight(x, log_ratio)
    _check_advantage_broadcast(expanded, log_ratio)
    return expanded


def _ratio_metrics(log_ratio: Tensor) -> Tensors:
    """Return what ClipPPOLoss logs of the ratio to the policy that collected."""
    flat = log_ratio.flatten()
    effective = (2.0 * flat.logsumexp(0) - (2.0 * flat).logsumexp(0)).exp()
    ratio = flat.exp()
    return {"ESS": effective / flat.numel(), "max_ratio": ratio.max(), "mean_ratio": ratio.mean()}
