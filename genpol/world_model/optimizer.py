"""The optimisers of a world model: one of them takes smaller steps with some parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from genpol.nn.optimizer import GuardedOptimizer
from genpol.world_model.networks import WorldModel
from genpol.world_model.settings import WorldModelSettings


class GradedOptimizer(GuardedOptimizer):
    """:class:`~genpol.nn.optimizer.GuardedOptimizer` with a smaller step size for one part.

    The gradient is clipped over both parts together, which two optimisers would not do.

    Args:
        slow: What takes the smaller steps.
        parameters: What takes the others.
        learning_rate: Step size of those.
        share: Of it that the first part takes.
        max_grad_norm: See :class:`~genpol.nn.optimizer.GuardedOptimizer`.
        eps: See there.
        patience: See there.
        name: See there.
    """

    def __init__(
        self,
        slow: Iterable[nn.Parameter],
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        *,
        share: float,
        max_grad_norm: float,
        eps: float,
        patience: int = 10,
        name: str = "loss",
    ) -> None:
        first = list(slow)
        super().__init__(
            [*first, *parameters],
            learning_rate,
            max_grad_norm=max_grad_norm,
            eps=eps,
            patience=patience,
            name=name,
        )
        self._num_slow = len(first)
        self._share = share

    def _adam(self, gradients: Mapping[int, Tensor]) -> None:
        full = self.learning_rate
        slow = {index: g for index, g in gradients.items() if index < self._num_slow}
        rest = {index: g for index, g in gradients.items() if index >= self._num_slow}
        try:
            for part, rate in ((slow, self._share * full), (rest, full)):
                self.learning_rate = rate
                if part:
                    super()._adam(part)
        finally:
            self.learning_rate = full


def optimizers(model: WorldModel, settings: WorldModelSettings) -> dict[str, GuardedOptimizer]:
    """Return those of all networks but the averaged critics: of the ``model``, and the ``policy``.

    Args:
        model: The networks.
        settings: Step sizes and clipping.
    """
    own = {id(x) for part in (model.encoder, model.policy) for x in part.parameters()}
    return {
        "model": GradedOptimizer(
            model.encoder.parameters(),
            [x for x in model.parameters() if x.requires_grad and id(x) not in own],
            settings.learning_rate,
            share=settings.encoder_rate,
            max_grad_norm=settings.max_grad_norm,
            eps=1e-8,
            patience=settings.nonfinite_patience,
            name="model",
        ),
        "policy": GuardedOptimizer(
            model.policy.parameters(),
            settings.learning_rate,
            max_grad_norm=settings.max_grad_norm,
            eps=1e-5,
            patience=settings.nonfinite_patience,
            name="policy",
        ),
    }
