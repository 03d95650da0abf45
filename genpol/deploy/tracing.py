"""A policy as a graph of tensors: from an observation and its noise to a chunk of actions.

Whatever a policy does in acting (normalisers, all solver steps, gradients of critics, the choice
among candidates) is traced into operations on tensors. The Gaussian numbers that it draws from its
generator become slices of an input, in the order of the draws, so that a graph is a function, and
who holds it decides on the randomness.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torchrl.envs import ExplorationType, set_exploration_type

from genpol.agent import Agent, StatefulPolicy
from genpol.errors import ConfigError
from genpol.offline.chunk_agent import ChunkAgent

Act = Callable[[Tensor], Tensor]
"""Observations ``[B, d]`` to chunks of actions ``[B, H, A]``."""

_OTHER_DRAWS = (
    *(torch.rand, torch.rand_like, torch.randn_like, torch.randint, torch.randperm),
    *(torch.normal, torch.bernoulli, torch.multinomial, torch.poisson),
    *(torch.Tensor.uniform_, torch.Tensor.exponential_, torch.Tensor.bernoulli_),
    torch.Tensor.random_,
)


class NoiseTape(TorchFunctionMode):
    """Takes the generator's place: each ``torch.randn`` or ``normal_`` is the next slice of a tape.

    Args:
        tape: ``[B, n]``; ``None`` to draw as ever and only count.
        batch: Rows B of every draw's tape.

    Attributes:
        used: Numbers per row that were drawn so far.
    """

    def __init__(self, tape: Tensor | None = None, *, batch: int = 1) -> None:
        super().__init__()
        self._tape = tape
        self._batch = batch
        self.used = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See :class:`torch.overrides.TorchFunctionMode`."""
        kwargs = kwargs or {}
        standard = not {*kwargs} - {"generator"} and len(args) == 1
        in_place = func is torch.Tensor.normal_ and standard
        if func in _OTHER_DRAWS or (func is torch.Tensor.normal_ and not standard):
            raise ConfigError(
                f"export: the policy draws {getattr(func, '__name__', func)} numbers in acting, "
                "which cannot be an input; only standard Gaussian ones can"
            )
        if func is not torch.randn and not in_place:
            return func(*args, **kwargs)
        shape = args[0].shape if in_place else torch.Size(kwargs.get("size") or _shape(args))
        first, self.used = self.used, self.used + math.prod(shape) // self._batch
        if self._tape is None:
            return func(*args, **kwargs)
        drawn = self._tape[:, first : self.used].reshape(shape)
        return args[0].copy_(drawn) if in_place else drawn


def _shape(args: tuple[Any, ...]) -> Sequence[int]:
    return args if args and isinstance(args[0], int) else args[0]


@dataclass(frozen=True)
class TracedPolicy:
    """A policy as a graph.

    Attributes:
        graph: Maps observations ``[1, d]`` and noise ``[1, n]`` to chunks ``[1, H, A]``.
        observation_dim: d, with the goal behind the observation where there is one.
        noise_dim: n; 0 where nothing is drawn, and then the noise is not looked at.
        horizon: H.
        action_dim: A.
        action_steps: Actions of a chunk that are carried out before the next.
    """

    graph: GraphModule
    observation_dim: int
    noise_dim: int
    horizon: int
    action_dim: int
    action_steps: int


def acting(agent: Agent, exploration: ExplorationType) -> tuple[Act, int]:
    """Return what an agent's policy does with an observation, and how much of it is carried out.

    Raises:
        ConfigError: If its policy remembers what it did, so that it is no function.
    """
    if isinstance(agent, ChunkAgent):
        chunk_agent = agent

        def plan(observation: Tensor) -> Tensor:
            with set_exploration_type(exploration):
                return chunk_agent.plan_actions(observation, agent.generator)

        settings = agent.settings
        return plan, settings.action_steps or settings.horizon - settings.past_steps
    if isinstance(agent.policy, StatefulPolicy):
        raise ConfigError(
            f"export: {type(agent).__name__} acts by what it remembers of earlier steps, which a "
            "graph of one step cannot hold"
        )

    def act(observation: Tensor) -> Tensor:
        step = TensorDict({"observation": observation}, observation.shape[:1])
        with set_exploration_type(exploration):
            action: Tensor = agent.policy(step)["action"]
        return action.unsqueeze(1)

    return act, 1


def trace(agent: Agent, *, stochastic: bool = False) -> TracedPolicy:
    """Trace an agent's policy.

    Args:
        agent: Whose policy.
        stochastic: Whether it samples, as in training, or takes modes where it has them.

    Raises:
        ConfigError: If its policy is no function of an observation and Gaussian noise.
    """
    exploration = ExplorationType.RANDOM if stochastic else ExplorationType.DETERMINISTIC
    act, action_steps = acting(agent, exploration)
    width = agent.specs.observation_dim + agent.specs.goal_dim * bool(
        getattr(agent, "told_goal", False)
    )
    observation = torch.zeros(1, width)
    with torch.no_grad():
        with NoiseTape() as tape:
            chunk = act(observation)
        noise = torch.zeros(1, tape.used)

        def function(observation: Tensor, noise: Tensor) -> Tensor:
            with NoiseTape(noise):
                return act(observation)

        graph = make_fx(function)(observation, noise)
    return TracedPolicy(graph, width, tape.used, chunk.shape[1], chunk.shape[2], action_steps)
