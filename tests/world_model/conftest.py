"""A linear-quadratic system in the place of a learned model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from genpol.world_model.networks import PolicyDraw, Task

PRICE = 1.3740173
"""Solution P of the Riccati equation: the value of z is -P z^2."""
GAIN = 1.7000787
"""The best action is -K z."""


class LinearQuadratic:
    """``z' = 1.1 z + 0.5 u``, ``r = -(z^2 + 0.1 u^2)``, with the best policy and its value.

    It has what planners ask of :class:`~genpol.world_model.WorldModel`.
    """

    action_dim = 1
    energy = None
    termination = None

    def __init__(self):
        self.critics = SimpleNamespace(num_members=2)
        self.scalar = SimpleNamespace(decode=lambda x: x)

    def task(self):
        return Task(None, None, torch.tensor(0.99))

    def imagine(self, latent, actions, task):
        latents = [latent]
        for action in actions:
            latents.append(1.1 * latents[-1] + 0.5 * action)
        return torch.stack(latents)

    def dynamics(self, pair):
        return 1.1 * pair[..., :1] + 0.5 * pair[..., 1:]

    def pair(self, latent, action, task):
        return torch.cat((latent, action), -1)

    def reward(self, pair):
        return -(pair[..., 0].square() + 0.1 * pair[..., 1].square())

    def act(self, latent, noise, task):
        return PolicyDraw((-GAIN * latent).clamp(-1.0, 1.0), torch.zeros_like(latent))

    def values(self, latent, action, task, *, members=None, averaged=False, frozen=False):
        left = 1.1 * latent + 0.5 * action
        value = self.reward(self.pair(latent, action, task)) - 0.99 * PRICE * left[..., 0].square()
        return value.expand(2, *value.shape)


@pytest.fixture
def system():
    """Return the system."""
    return LinearQuadratic()
