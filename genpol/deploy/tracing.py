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
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torchrl.envs import ExplorationType, set_exploration_type

from genpol.agent import Agent, StatefulPolicy
from genpol.errors import ConfigError
from genpol.offline.chunk_agent import ChunkAgent
from genpol.offline.correction import CorrectedPolicy
from genpol.on_policy.pretrained import PretrainedPolicyHead
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy
from genpol.policies.real_time import bound_sample
from genpol.pretrained import PolicyHolder
from genpol.world_model import WorldModelAgent

Act = Callable[..., Tensor]
"""Observations ``[B, d]``, and what else :attr:`Acting.memory` asks for, to ``[B, H, A]``."""

MEMORIES = ("none", "plan", "chunk")

_OTHER_DRAWS = (
    *(torch.rand_like, torch.randn_like, torch.randint, torch.randperm),
    *(torch.normal, torch.bernoulli, torch.multinomial, torch.poisson),
    *(torch.Tensor.uniform_, torch.Tensor.exponential_, torch.Tensor.bernoulli_),
    torch.Tensor.random_,
)
_BELOW_ONE = 1.0 - 2.0**-24


class NoiseTape(TorchFunctionMode):
    """Takes the generator's place: each ``torch.randn`` or ``normal_`` is the next slice of a tape.

    So is each ``torch.rand``, of which the tape holds the normal quantiles.

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
                "which cannot be an input; only standard Gaussian and uniform ones can"
            )
        if func not in (torch.randn, torch.rand) and not in_place:
            return func(*args, **kwargs)
        shape = args[0].shape if in_place else torch.Size(kwargs.get("size") or _shape(args))
        first, self.used = self.used, self.used + math.prod(shape) // self._batch
        if self._tape is None:
            return func(*args, **kwargs)
        drawn = self._tape[:, first : self.used].reshape(shape)
        if func is torch.rand:
            return (0.5 + 0.5 * torch.erf(drawn / math.sqrt(2.0))).clamp(max=_BELOW_ONE)
        return args[0].copy_(drawn) if in_place else drawn


def _shape(args: tuple[Any, ...]) -> Sequence[int]:
    return args if args and isinstance(args[0], int) else args[0]


@dataclass(frozen=True)
class Acting:
    """What a policy does in acting, as a function.

    Attributes:
        act: The function.
        action_steps: Actions of a chunk that are carried out before the next.
        memory: What it is told of the chunk before: `none`; `plan`, its actions from now on with
            zeros behind them, ``previous`` ``[B, H, A]``, where a search begins; or `chunk`, also
            how much it is bound to each of them, ``kept`` ``[B, H]`` from 0 to 1.
    """

    act: Act
    action_steps: int
    memory: str = "none"


@dataclass(frozen=True)
class TracedPolicy:
    """A policy as a graph.

    Attributes:
        graph: Maps its inputs, in order and with a leading dimension of 1, to ``[1, H, A]``.
        inputs: Names and shapes: ``observation`` ``[d]``, with the goal behind it where there is
            one; ``noise`` ``[n]``, which is not looked at if n is 0; ``previous`` and ``kept`` as
            :class:`Acting` has them.
        horizon: H.
        action_dim: A.
        action_steps: See :class:`Acting`.
        memory: See :class:`Acting`.
    """

    graph: GraphModule
    inputs: Mapping[str, tuple[int, ...]]
    horizon: int
    action_dim: int
    action_steps: int
    memory: str = "none"

    @property
    def observation_dim(self) -> int:
        """Numbers of an observation d."""
        return self.inputs["observation"][0]

    @property
    def noise_dim(self) -> int:
        """Normal numbers n that a chunk takes."""
        return self.inputs["noise"][0]


def acting(
    agent: Agent, exploration: ExplorationType, *, real_time_chunking: bool = False
) -> Acting:
    """Return what an agent's policy does with an observation.

    Args:
        agent: Whose policy.
        exploration: Whether it samples or takes modes.
        real_time_chunking: Let chunks go on from those before; see
            :mod:`genpol.policies.real_time`.

    Raises:
        ConfigError: If its policy remembers what a graph cannot be told, or cannot be bound.
    """
    policy = agent.policy
    corrected = policy if isinstance(policy, CorrectedPolicy) else None
    if corrected is not None:
        policy = corrected.policy
    if real_time_chunking:
        if corrected is not None:
            raise ConfigError("export: real_time_chunking and a corrector do not go together")
        return _bound(agent)
    found = _plan(agent, policy, exploration)
    return found if corrected is None else _corrected(found, corrected, agent)


def _plan(agent: Agent, policy: TensorDictModuleBase, exploration: ExplorationType) -> Acting:
    if isinstance(agent, ChunkAgent):
        chunk_agent = agent

        carried = agent.plan_steps - agent.settings.past_steps  # those behind are of the past

        def plan(observation: Tensor) -> Tensor:
            with set_exploration_type(exploration):
                return chunk_agent.plan_actions(observation, agent.generator)[:, :carried]

        return Acting(plan, _action_steps(agent))
    if isinstance(agent, WorldModelAgent):
        searcher = agent
        first = "action" if exploration is ExplorationType.DETERMINISTIC else "explored"

        def search(observation: Tensor, previous: Tensor) -> Tensor:
            found = searcher.search(observation, previous, agent.generator)
            action: Tensor = getattr(found, first)
            return torch.cat((action.unsqueeze(1), found.plan[:, 1:]), dim=1)

        return Acting(search, 1, "plan")

    def act(observation: Tensor) -> Tensor:
        step = TensorDict({"observation": observation}, observation.shape[:1])
        with set_exploration_type(exploration):
            action: Tensor = policy(step)["action"]
        return action.unsqueeze(1)

    if isinstance(policy, StatefulPolicy) and not isinstance(policy, PretrainedPolicyHead):
        raise ConfigError(
            f"export: {type(agent).__name__} acts by what it remembers of earlier steps, which a "
            "graph of one step cannot hold"
        )
    chunking = getattr(getattr(agent, "settings", None), "chunking", None)
    if chunking is None:
        return Acting(act, 1)
    horizon, steps = chunking
    # The environment's action is a flattened chunk there.
    return Acting(lambda observation: act(observation).unflatten(-1, (horizon, -1))[:, 0], steps)


def _corrected(found: Acting, corrected: CorrectedPolicy, agent: Agent) -> Acting:
    if found.action_steps > 1:
        raise ConfigError(
            f"export: a corrector looks at every step's observation, and {found.action_steps} "
            "actions are carried out without one; add agent.action_steps=1"
        )
    corrector, settings = corrected.corrector, corrected.settings
    width = agent.specs.observation_dim

    def correct(observation: Tensor, *memory: Tensor) -> Tensor:
        chunk = found.act(observation, *memory)
        first, _ = corrector.correct(observation[..., :width], chunk[:, 0], settings)
        return torch.cat((first.unsqueeze(1), chunk[:, 1:]), dim=1)

    return Acting(correct, 1, found.memory)


def _bound(agent: Agent) -> Acting:
    if not isinstance(agent, ChunkAgent) or not isinstance(agent, PolicyHolder):
        raise ConfigError(
            "export: real_time_chunking binds chunks of a flow model, which bc and ogpo have; "
            f"{type(agent).__name__} has none"
        )
    flow = agent.behaviour
    lacks = _why_not_bound(flow)
    if lacks:
        raise ConfigError(f"export: real_time_chunking binds chunks of a flow; this policy {lacks}")
    assert isinstance(flow, FlowPolicy)
    bound, chunk_agent = flow, agent

    def plan(observation: Tensor, previous: Tensor, kept: Tensor) -> Tensor:
        noise = torch.randn(1, *bound.action_shape, generator=chunk_agent.generator)
        own = bound_sample(
            bound, chunk_agent.encode(observation), noise, chunk_agent.own_actions(previous), kept
        )
        shift, scale = chunk_agent.action_shift, chunk_agent.action_scale
        return (shift + scale * own).clamp(-1.0, 1.0)

    _check_plain(agent, plan)
    return Acting(plan, _action_steps(agent), "chunk")


@torch.no_grad()
def _check_plain(agent: ChunkAgent, plan: Act) -> None:
    """Refuse a policy that does more than sample its flow, which a bound chunk would leave out."""
    width = agent.specs.observation_dim + agent.specs.goal_dim * agent.told_goal
    draw = torch.Generator().manual_seed(0)
    observation = torch.randn(1, width, generator=draw)
    with NoiseTape() as tape:
        agent.plan_actions(observation, agent.generator)
    noise = torch.randn(1, tape.used, generator=draw)
    shape = (1, agent.plan_steps, agent.specs.action_dim)
    with NoiseTape(noise):
        wanted = agent.plan_actions(observation, agent.generator)
    with NoiseTape(noise) as own:
        found = plan(observation, torch.zeros(shape), torch.zeros(shape[:2]))
    if own.used != tape.used or not torch.allclose(found, wanted, atol=1e-4):
        raise ConfigError(
            "export: real_time_chunking takes one sample of the flow as it is; leave guidance out, "
            "and best of N (agent.best_of=1)"
        )


def _why_not_bound(flow: FlowPolicy | DiffusionPolicy) -> str:
    if isinstance(flow, DiffusionPolicy):
        return "is a diffusion model"
    if flow.horizon < 2:
        return "makes single actions"
    if flow.past_steps:
        return "has actions of the past at its chunks' ends"
    if flow.solver != "euler" or flow.state_clip is not None:
        return "does not take plain Euler steps"
    return ""


def _action_steps(agent: ChunkAgent) -> int:
    settings = agent.settings
    return settings.action_steps or agent.plan_steps - settings.past_steps


def trace(
    agent: Agent, *, stochastic: bool = False, real_time_chunking: bool = False
) -> TracedPolicy:
    """Trace an agent's policy.

    Args:
        agent: Whose policy.
        stochastic: Whether it samples, as in training, or takes modes where it has them.
        real_time_chunking: See :func:`acting`.

    Raises:
        ConfigError: If its policy is no function of an observation, Gaussian noise, and the chunk
            before.
    """
    found = acting(agent, exploration_of(stochastic), real_time_chunking=real_time_chunking)
    width = agent.specs.observation_dim + agent.specs.goal_dim * bool(
        getattr(agent, "told_goal", False)
    )
    observation = torch.zeros(1, width)
    memory = _memory(found, agent)
    with torch.no_grad():
        with NoiseTape() as tape:
            chunk = found.act(observation, *memory.values())
        noise = torch.zeros(1, tape.used)

        def function(observation: Tensor, noise: Tensor, *memory: Tensor) -> Tensor:
            with NoiseTape(noise):
                return found.act(observation, *memory)

        graph = make_fx(function)(observation, noise, *memory.values())
    given = {"observation": observation, "noise": noise, **memory}
    inputs = {name: tuple(x.shape[1:]) for name, x in given.items()}
    return TracedPolicy(
        graph, inputs, chunk.shape[1], chunk.shape[2], found.action_steps, found.memory
    )


def _memory(found: Acting, agent: Agent) -> dict[str, Tensor]:
    if found.memory == "none":
        return {}
    assert isinstance(agent, ChunkAgent | WorldModelAgent)
    horizon = agent.plan_steps if isinstance(agent, ChunkAgent) else agent.settings.horizon
    previous = {"previous": torch.zeros(1, horizon, agent.specs.action_dim)}
    return previous | ({"kept": torch.zeros(1, horizon)} if found.memory == "chunk" else {})


def exploration_of(stochastic: bool) -> ExplorationType:
    """Return how a policy acts that samples, or does not."""
    return ExplorationType.RANDOM if stochastic else ExplorationType.DETERMINISTIC
