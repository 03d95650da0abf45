"""Adam that clips its gradients, skips non-finite updates, and gives up when they do not cease."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from genpol.errors import CheckpointError, NonFiniteError


class AdamMoments(NamedTuple):
    """What Adam remembers of one parameter, and its epsilon."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    eps: float


class GuardedOptimizer:
    """Adam (Kingma & Ba 2015, algorithm 1) behind a gradient clip and a guard against NaN.

    Args:
        parameters: What to optimise.
        learning_rate: Adam's step size.
        max_grad_norm: Bound of the gradient's 2-norm over all parameters; ``math.inf`` for none.
        eps: Adam's epsilon.
        patience: So many non-finite updates in a row end the training.
        name: What the loss trains; metrics and errors bear it.

    Attributes:
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
        self._parameters = list(parameters)
        fused = all(p.device.type in {"cpu", "cuda"} for p in self._parameters)
        self._adam = torch.optim.Adam(self._parameters, lr=learning_rate, eps=eps, fused=fused)
        self._max_grad_norm = max_grad_norm
        self._patience = patience
        self._name = name
        self._skipped_in_a_row = 0
        self.skipped = 0

    @property
    def learning_rate(self) -> float:
        """Adam's step size, for schedules to set."""
        return float(self._adam.param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._adam.param_groups[0]["lr"] = value

    def step(self, loss: Tensor) -> dict[str, Tensor]:
        """Differentiate a scalar loss and take one step, unless loss or gradient are not finite.

        Returns:
            ``<name>/grad_norm`` before clipping, and ``<name>/skipped``, the count so far.

        Raises:
            NonFiniteError: If this is the ``patience``-th non-finite update in a row.
        """
        self._adam.zero_grad()
        loss.backward()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        if torch.isfinite(loss) & torch.isfinite(norm):
            nn.utils.clip_grads_with_norm_(self._parameters, self._max_grad_norm, norm)
            self._adam.step()
            self._skipped_in_a_row = 0
        else:
            self._adam.zero_grad()  # leave no NaN behind for others who read the gradients
            self._skip(loss, norm)
        return {
            f"{self._name}/grad_norm": norm.detach(),
            f"{self._name}/skipped": torch.tensor(float(self.skipped)),
        }

    def moments(self, parameter: Tensor) -> AdamMoments | None:
        """Return Adam's live moments of one parameter, or ``None`` before the first step."""
        state = self._adam.state.get(parameter)
        if not state:
            return None
        return AdamMoments(
            exp_avg=state["exp_avg"],
            exp_avg_sq=state["exp_avg_sq"],
            step=int(state["step"]),
            eps=float(self._adam.param_groups[0]["eps"]),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return Adam's moments by parameter index, the shapes, learning rate and counters.

        The moments are the live tensors: save or copy them before the next step. What the settings
        say (epsilon, clip, patience) is left to the settings.
        """
        return {
            "moments": dict(self._adam.state_dict()["state"]),
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
        # Copied, because torch would go on in the very tensors it is given.
        moments = {
            index: {key: value.clone() for key, value in entry.items()}
            for index, entry in state["moments"].items()
        }
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": moments, "param_groups": groups})
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

    def _skip(self, loss: Tensor, norm: Tensor) -> None:
        self.skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row >= self._patience:
            raise NonFiniteError(
                f"{self._name}: not finite in {self._skipped_in_a_row} updates in a row (loss "
                f"{loss.item():.3g}, gradient norm {norm.item():.3g}); lower the learning rate or "
                "max_grad_norm, and look for extreme observations and rewards"
            )
