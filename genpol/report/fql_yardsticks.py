"""FQL as others write it, to measure beside the library's own: a plain torch loop, and JAX.

The same for all: networks, batch, Adam, the steps of the flow, and the four losses; the tests give
all three the same weights and noise and compare losses and gradients. What differs is each one's
own way:

- the plain loop has a module per critic and :class:`torch.optim.Adam` as it comes, as a script has,
  and adds up the losses for one backward pass;
- JAX has its parameters in a dictionary and its whole update, Adam and random numbers included, in
  one jitted function that overwrites its arguments, as FQL's authors do;
- genpol bounds the gradient, and leaves out updates whose loss or gradient is not finite.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genpol.report.benchmark import Chunk, SkippedError

if TYPE_CHECKING:
    from jax import Array

Rows = Mapping[str, np.ndarray]
"""Transitions: ``observation``, ``next_observation`` ``[n, d]``, ``action`` ``[n, A]``, ``reward``
and ``discount`` ``[n]``, the discount zero where the transition ended its task."""

_LAYER_NORM_EPS = 1e-6  # Flax's


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What all contenders do alike."""

    observation_dim: int
    """Width d of the observation."""
    action_dim: int
    """Width A of the action."""
    batch_size: int
    """Transitions per update."""
    actor_hidden: Sequence[int]
    """Widths of the hidden layers of flow and one-step policy, followed by GELU."""
    critic_hidden: Sequence[int]
    """Widths of the critics', followed by GELU and layer norm."""
    num_critics: int
    """Size of the ensemble."""
    activation: str
    """``gelu``, or ``gelu_tanh`` for its approximation."""
    solver_steps: int
    """Euler steps from noise to action."""
    alpha: float
    """Weight of the distance to the flow."""
    polyak: float
    """Share of the live critics in every update of the averaged ones."""
    learning_rate: float
    """Adam's step size."""
    seed: int
    """Seed of weights and noise."""


class Draws(NamedTuple):
    """The random numbers of one update, ``[B, A]`` and the times ``[B, 1]``."""

    next_action: Any
    """Noise of the policy at the next state."""
    flow: Any
    """Noise that the flow starts from in imitation."""
    time: Any
    """Times of imitation, uniform in [0, 1]."""
    policy: Any
    """Noise that the policy and the flow turn into the same action."""


# --- a plain torch loop ----------------------------------------------------------------------


class OneFileFQL(nn.Module):
    """FQL as a script writes it.

    Args:
        work: Sizes and step size.
    """

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.work = work
        d, a = work.observation_dim, work.action_dim
        self.critics = nn.ModuleList(
            _net(work, d + a, work.critic_hidden, 1, norm=True) for _ in range(work.num_critics)
        )
        self.target_critics = copy.deepcopy(self.critics).requires_grad_(False)
        self.flow = _net(work, d + a + 1, work.actor_hidden, a, norm=False)
        self.policy = _net(work, d + a, work.actor_hidden, a, norm=False)
        trained = [p for p in self.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=work.learning_rate)

    def draw(self, rows: int) -> Draws:
        """Draw the random numbers of one update."""
        shape = (rows, self.work.action_dim)
        return Draws(
            torch.randn(shape), torch.randn(shape), torch.rand(rows, 1), torch.randn(shape)
        )

    def loss(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        """Return the sum of all losses."""
        work = self.work
        observation, action = batch["observation"], batch["action"]
        with torch.no_grad():
            after = batch["next_observation"]
            next_action = self.policy(torch.cat([after, draws.next_action], 1)).clamp(-1, 1)
            following = _values(self.target_critics, after, next_action).mean(0)
            target = batch["reward"] + batch["discount"] * following
        critic_loss = F.mse_loss(
            _values(self.critics, observation, action), target.expand(work.num_critics, -1)
        )

        x = (1 - draws.time) * draws.flow + draws.time * action
        velocity = self.flow(torch.cat([observation, x, draws.time], 1))
        flow_loss = F.mse_loss(velocity, action - draws.flow)

        with torch.no_grad():
            flow_action = draws.policy
            for step in range(work.solver_steps):
                time = torch.full_like(draws.time, step / work.solver_steps)
                velocity = self.flow(torch.cat([observation, flow_action, time], 1))
                flow_action = flow_action + velocity / work.solver_steps
            flow_action = flow_action.clamp(-1, 1)
        own_action = self.policy(torch.cat([observation, draws.policy], 1))
        distill_loss = F.mse_loss(own_action, flow_action)
        self.critics.requires_grad_(False)
        value = _values(self.critics, observation, own_action.clamp(-1, 1)).mean()
        self.critics.requires_grad_(True)
        return critic_loss + flow_loss + work.alpha * distill_loss - value

    def update(self, batch: Mapping[str, Tensor]) -> None:
        """Take one step on transitions."""
        loss = self.loss(batch, self.draw(len(batch["reward"])))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            pairs = zip(self.target_critics.parameters(), self.critics.parameters(), strict=True)
            for target, live in pairs:
                target.copy_(self.work.polyak * live + (1 - self.work.polyak) * target)


def _values(critics: nn.ModuleList, observation: Tensor, action: Tensor) -> Tensor:
    together = torch.cat([observation, action], 1)
    return torch.stack([critic(together).squeeze(1) for critic in critics])


def _net(
    work: Workload, inputs: int, hidden: Sequence[int], outputs: int, *, norm: bool
) -> nn.Sequential:
    approximate = "tanh" if work.activation == "gelu_tanh" else "none"
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise((inputs, *hidden)):
        layers += [nn.Linear(fan_in, fan_out), nn.GELU(approximate=approximate)]
        if norm:
            layers += [nn.LayerNorm(fan_out, eps=_LAYER_NORM_EPS, elementwise_affine=False)]
    return nn.Sequential(*layers, nn.Linear(([inputs, *hidden])[-1], outputs))


def torch_update(work: Workload, rows: Rows) -> Chunk:
    """Return the work of one update of the plain loop, always on the same batch."""
    torch.manual_seed(work.seed)
    agent = OneFileFQL(work)
    batch = {name: torch.from_numpy(x[: work.batch_size]) for name, x in rows.items()}
    return _one(lambda: agent.update(batch))


def torch_train(work: Workload, rows: Rows) -> Chunk:
    """Return the work of one update of the plain loop on a batch drawn from the rows."""
    torch.manual_seed(work.seed)
    agent, generator = OneFileFQL(work), np.random.default_rng(work.seed)

    def step() -> None:
        index = generator.integers(len(rows["reward"]), size=work.batch_size)
        agent.update({name: torch.from_numpy(x[index]) for name, x in rows.items()})

    return _one(step)


# --- JAX -------------------------------------------------------------------------------------


def jax_loss(work: Workload, parameters: Any, target: Any, batch: Any, draws: Draws) -> Array:
    """Return the sum of all losses.

    Args:
        work: Sizes.
        parameters: ``critics``, ``flow`` and ``policy``: lists of (weight, bias) with weights
            ``[inputs, outputs]``, in ``critics`` stacked over the ensemble.
        target: The averaged critics.
        batch: As :data:`Rows`.
        draws: Random numbers.
    """
    import jax
    from jax import numpy as jnp

    observation, action = batch["observation"], batch["action"]
    stop = jax.lax.stop_gradient

    def values(critics: Any, state: Array, chosen: Array) -> Array:
        together = jnp.concatenate([state, chosen], 1)
        return jax.vmap(lambda x: _jax_net(work, x, together, norm=True)[:, 0])(critics)

    def flow(state: Array, x: Array, time: Array) -> Array:
        together = jnp.concatenate([state, x, time], 1)
        return _jax_net(work, parameters["flow"], together, norm=False)

    def policy(state: Array, noise: Array) -> Array:
        together = jnp.concatenate([state, noise], 1)
        return _jax_net(work, parameters["policy"], together, norm=False)

    after = batch["next_observation"]
    next_action = jnp.clip(policy(after, draws.next_action), -1, 1)
    following = values(target, after, next_action).mean(0)
    goal = stop(batch["reward"] + batch["discount"] * following)
    critic_loss = jnp.square(values(parameters["critics"], observation, action) - goal).mean()

    x = (1 - draws.time) * draws.flow + draws.time * action
    errors = flow(observation, x, draws.time) - (action - draws.flow)
    flow_loss = jnp.square(errors).mean()

    flow_action = draws.policy
    for step in range(work.solver_steps):
        time = jnp.full_like(draws.time, step / work.solver_steps)
        flow_action = flow_action + flow(observation, flow_action, time) / work.solver_steps
    flow_action = stop(jnp.clip(flow_action, -1, 1))
    own_action = policy(observation, draws.policy)
    distill_loss = jnp.square(own_action - flow_action).mean()
    value = values(stop(parameters["critics"]), observation, jnp.clip(own_action, -1, 1)).mean()
    return critic_loss + flow_loss + work.alpha * distill_loss - value


def _jax_net(work: Workload, layers: Any, x: Array, *, norm: bool) -> Array:
    import jax
    from jax import numpy as jnp

    for weight, bias in layers[:-1]:
        x = jax.nn.gelu(x @ weight + bias, approximate=work.activation == "gelu_tanh")
        if norm:
            centred = x - x.mean(-1, keepdims=True)
            variance = jnp.square(centred).mean(-1, keepdims=True)
            x = centred * jax.lax.rsqrt(variance + _LAYER_NORM_EPS)
    weight, bias = layers[-1]
    return x @ weight + bias


def _jax_parts(work: Workload) -> tuple[Any, Callable[..., Any]]:
    """Return the state of training and the jitted update that maps (state, batch) to the next."""
    try:
        import jax
        import optax
    except ImportError:
        raise SkippedError("JAX is not installed: pip install 'genpol[bench]'") from None
    from jax import numpy as jnp

    torch.manual_seed(work.seed)
    parameters = jax.tree.map(jnp.array, to_jax(OneFileFQL(work)))
    adam = optax.adam(work.learning_rate)
    state = {
        "parameters": parameters,
        "target": jax.tree.map(jnp.copy, parameters["critics"]),
        "adam": adam.init(parameters),
        "key": jax.random.key(work.seed),
    }

    def update(state: Any, batch: Any) -> Any:
        key, *keys = jax.random.split(state["key"], 5)
        shape = (work.batch_size, work.action_dim)
        draws = Draws(
            jax.random.normal(keys[0], shape),
            jax.random.normal(keys[1], shape),
            jax.random.uniform(keys[2], (work.batch_size, 1)),
            jax.random.normal(keys[3], shape),
        )
        target, share = state["target"], work.polyak
        slope = jax.grad(lambda x: jax_loss(work, x, target, batch, draws))(state["parameters"])
        change, moments = adam.update(slope, state["adam"])
        parameters = optax.apply_updates(state["parameters"], change)
        target = jax.tree.map(
            lambda slow, live: share * live + (1 - share) * slow, target, parameters["critics"]
        )
        return {"parameters": parameters, "target": target, "adam": moments, "key": key}

    return state, jax.jit(update, donate_argnums=0)


def to_jax(agent: OneFileFQL, critics: nn.ModuleList | None = None) -> dict[str, Any]:
    """Return the weights of the plain loop as :func:`jax_loss` takes them, in NumPy arrays.

    Args:
        agent: The plain loop.
        critics: Its live ones by default.
    """

    def layers(net: nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
        return [
            (x.weight.detach().numpy().T.copy(), x.bias.detach().numpy().copy())
            for x in net.modules()
            if isinstance(x, nn.Linear)
        ]

    members = [layers(critic) for critic in critics or agent.critics]
    stacked = [
        (np.stack([weight for weight, _ in layer]), np.stack([bias for _, bias in layer]))
        for layer in zip(*members, strict=True)
    ]
    return {"critics": stacked, "flow": layers(agent.flow), "policy": layers(agent.policy)}


def jax_update(work: Workload, rows: Rows) -> Chunk:
    """Return the work of one jitted update, always on the same batch.

    Raises:
        SkippedError: If JAX is not installed.
    """
    state, update = _jax_parts(work)
    import jax

    batch = {name: jax.device_put(x[: work.batch_size]) for name, x in rows.items()}

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(update(state, batch))

    return _one(step)


def jax_train(work: Workload, rows: Rows) -> Chunk:
    """Return the work of one jitted update on a batch drawn from the rows.

    Raises:
        SkippedError: If JAX is not installed.
    """
    state, update = _jax_parts(work)
    import jax

    generator = np.random.default_rng(work.seed)

    def step() -> None:
        nonlocal state
        index = generator.integers(len(rows["reward"]), size=work.batch_size)
        state = jax.block_until_ready(update(state, {name: x[index] for name, x in rows.items()}))

    return _one(step)


def _one(step: Callable[[], None]) -> Chunk:
    def chunk() -> int:
        step()
        return 1

    chunk()
    return chunk
