"""Adam that clips its gradients, skips non-finite updates, and gives up when they do not cease."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

from genpol import parallel
from genpol.errors import CheckpointError, NonFiniteError

_BETAS = (0.9, 0.999)


class AdamMoments(NamedTuple):
    """What Adam remembers of one parameter, and its epsilon."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    eps: float


def half_cosine(start: float, end: float, share: float) -> float:
    """Return what is between ``start`` and ``end`` after a share of the way, along half a cosine.

    Loshchilov & Hutter, arXiv 1608.03983, equation 5, without restarts.
    """
    return end + 0.5 * (1.0 + math.cos(math.pi * min(1.0, share))) * (start - end)


class GuardedOptimizer:
    """Adam (Kingma & Ba 2015, algorithm 1) behind a gradient clip and a guard against NaN.

    It computes what :class:`torch.optim.Adam` does, by torch's own function, but asks autograd for
    the gradients of what it trains instead of accumulating them: for the small networks of control,
    whose steps are over in a millisecond, the rest of an optimiser is a good part of an update.
    ``parameter.grad`` is the clipped gradient of the last step, ``None`` if that was skipped.

    Args:
        parameters: What to optimise.
        learning_rate: Adam's step size.
        max_grad_norm: Bound of the gradient's 2-norm over all parameters; ``math.inf`` for none.
        eps: Adam's epsilon.
        patience: So many non-finite updates in a row end the training.
        name: What the loss trains; metrics and errors bear it.

    Attributes:
        learning_rate: Adam's step size, for schedules to set.
        skipped: Updates skipped since the training began.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        *,
        max_grad_norm: float,
        eps: float,
        patience: int = 10,
        name: str = "loss",
    ) -> None:
        self.learning_rate = learning_rate
        self.skipped = 0
        self._parameters = list(parameters)
        self._fused = all(p.device.type in {"cpu", "cuda"} for p in self._parameters)
        self._moments: dict[int, dict[str, Tensor]] = {}
        self._max_grad_norm = max_grad_norm
        self._eps = eps
        self._patience = patience
        self._name = name
        self._skipped_in_a_row = 0

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        """Differentiate a scalar loss and take one step, unless loss or gradient are not finite.

        Returns:
            ``<name>/grad_norm`` before clipping, and ``<name>/skipped``, the count so far.

        Raises:
            NonFiniteError: If this is the ``patience``-th non-finite update in a row.
        """
        return step_together((self, loss))

    def _take(self, loss: Tensor, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
        """Take a step along gradients of the trained parameters; ``None`` leaves one alone."""
        # As they lie in memory where the parameters do, which the fused kernel relies on.
        given = {i: g.contiguous() for i, g in enumerate(gradients) if g is not None}
        flat = torch.cat([g.flatten() for g in given.values()]) if given else loss.new_zeros(1)
        norm = torch.linalg.vector_norm(flat)
        loss_value, norm_value = torch.stack((loss.detach(), norm)).tolist()
        if math.isfinite(loss_value) and math.isfinite(norm_value):
            if norm_value > self._max_grad_norm:
                # Not in place: two parameters may have been given one tensor.
                factor = self._max_grad_norm / (norm_value + 1e-6)
                given = {i: g * factor for i, g in given.items()}
            self._adam(given)
            self._skipped_in_a_row = 0
        else:
            given = {}  # leave no NaN behind for others who read the gradients
            self._skip(loss_value, norm_value)
        for index, parameter in enumerate(self._parameters):
            parameter.grad = given.get(index)
        return {
            f"{self._name}/grad_norm": norm,
            f"{self._name}/skipped": torch.tensor(float(self.skipped)),
        }

    @torch.no_grad()
    def _adam(self, gradients: Mapping[int, Tensor]) -> None:
        for index in gradients.keys() - self._moments.keys():
            parameter = self._parameters[index]
            self._moments[index] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, memory_format=torch.contiguous_format),
                "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.contiguous_format),
            }
        moments = [self._moments[index] for index in gradients]
        adam(
            [self._parameters[index] for index in gradients],
            list(gradients.values()),
            [x["exp_avg"] for x in moments],
            [x["exp_avg_sq"] for x in moments],
            [],
            [x["step"] for x in moments],
            fused=self._fused,
            amsgrad=False,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            lr=self.learning_rate,
            weight_decay=0.0,
            eps=self._eps,
            maximize=False,
        )

    def moments(self, parameter: Tensor) -> AdamMoments | None:
        """Return Adam's live moments of one parameter, or ``None`` before the first step."""
        for index, moments in self._moments.items():
            if self._parameters[index] is parameter:
                return AdamMoments(
                    exp_avg=moments["exp_avg"],
                    exp_avg_sq=moments["exp_avg_sq"],
                    step=int(moments["step"]),
                    eps=self._eps,
                )
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return Adam's moments by parameter index, the shapes, learning rate and counters.

        The moments are the live tensors: save or copy them before the next step. What the settings
        say (epsilon, clip, patience) is left to the settings.
        """
        return {
            "moments": {index: dict(self._moments[index]) for index in sorted(self._moments)},
            "shapes": [list(parameter.shape) for parameter in self._parameters],
            "learning_rate": self.learning_rate,
            "skipped": self.skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the next step is then the same to the bit.

        Raises:
            CheckpointError: If the moments are those of other parameters.
        """
        self._check(state)
        self._moments = {
            index: {
                key: x.to(self._parameters[index].device, copy=True) for key, x in entry.items()
            }
            for index, entry in state["moments"].items()
        }
        self.learning_rate = state["learning_rate"]
        self.skipped = state["skipped"]
        self._skipped_in_a_row = state["skipped_in_a_row"]

    def _check(self, state: Mapping[str, Any]) -> None:
        shapes = [list(parameter.shape) for parameter in self._parameters]
        if state["shapes"] != shapes:
            raise CheckpointError(
                f"optimiser of {self._name}: the checkpoint holds moments of parameters of shapes "
                f"{state['shapes']}, here they are {shapes}; use the settings it was saved with"
            )

    def _skip(self, loss: float, norm: float) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self._patience:
            raise NonFiniteError(
                f"{self._name}: not finite in {self._skipped_in_a_row} updates in a row (loss "
                f"{loss:.3g}, gradient norm {norm:.3g}); lower the learning rate or "
                "max_grad_norm, and look for extreme observations and rewards"
            )


def step_together(*parts: tuple[GuardedOptimizer, Tensor]) -> dict[str, Tensor]:
    """Differentiate several losses in one pass and take a step of each one's optimiser.

    Of several ranks (:mod:`genpol.parallel`), all take the same step, along their mean gradient.

    Args:
        parts: Optimisers and their losses, none of which may depend on what another optimiser
            trains: each is then learned as if it were alone, but for the time it takes.

    Returns:
        The metrics of :meth:`GuardedOptimizer.step`, of all.

    Raises:
        NonFiniteError: As :meth:`GuardedOptimizer.step` does.
    """
    trained = [[p for p in optimizer._parameters if p.requires_grad] for optimizer, _ in parts]
    total = torch.stack([loss for _, loss in parts]).sum() if len(parts) > 1 else parts[0][1]
    found = torch.autograd.grad(total, [p for some in trained for p in some], allow_unused=True)
    averaged, losses = parallel.mean_gradients(found, [loss for _, loss in parts])
    gradients = iter(averaged)
    metrics: dict[str, Tensor] = {}
    for (optimizer, _), loss in zip(parts, losses, strict=True):
        own = [next(gradients) if p.requires_grad else None for p in optimizer._parameters]
        metrics |= optimizer._take(loss, own)
    return metrics
