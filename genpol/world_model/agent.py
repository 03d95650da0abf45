"""The update of agents that learn a world model and plan in it: TD-MPC2, and what builds on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn import functional as F

from genpol.agent import DatasetAgent, Specs
from genpol.data.dataset import OfflineDataset
from genpol.data.windows import WindowSpec
from genpol.errors import ConfigError
from genpol.nn.compiling import compiled
from genpol.nn.masked import weighted_mean
from genpol.nn.normed_mlp import dropout_mask
from genpol.nn.simplicial import check_groups
from genpol.nn.two_hot import TwoHot
from genpol.objectives.world_model import (
    consistency_loss,
    over_horizon,
    policy_prior_loss,
    scaled_entropy,
    td_target,
    two_hot_loss,
    value_range,
)
from genpol.seeding import derive
from genpol.world_model.acting import SearchPolicy
from genpol.world_model.diagnostics import search_drift
from genpol.world_model.energy import EnergyScale
from genpol.world_model.networks import Task, WorldModel
from genpol.world_model.optimizer import optimizers
from genpol.world_model.pace import UpdatePace
from genpol.world_model.planning import Draws, Planned, Planner, two_critics
from genpol.world_model.settings import WorldModelSettings
from genpol.world_model.tasks import earlier_rows
from genpol.world_model.window import ModelLoss, Window


class WorldModelAgent(DatasetAgent):
    """TD-MPC2's model, critics and policy prior, and a planner that acts.

    It learns from what it collects, from data, or from data first. Where the environment has
    several tasks, the end of an observation tells which (see
    :class:`~genpol.envs.multitask.MultiTaskEnv`), and networks see an embedding of it instead.

    Losses are functions of tensors, with everything random an argument. A subclass makes its
    planners and calls :meth:`begin` at the end of its constructor.

    Attributes:
        model: The networks.
        energy_scale: Scale of the classifier's logits, where there is one.
        value_scale: By which the policy's values are divided, a scalar.
        planner: What acts.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
        energy: Scale of a classifier of behaviour, which the model then has.
        score: Whether the model has a score network.

    Raises:
        ConfigError: If rewards come in several terms, or simplices do not fill the latent state.
    """

    needs_data = False
    planner: Planner
    value_scale: Tensor

    def __init__(
        self,
        settings: WorldModelSettings,
        specs: Specs,
        *,
        device: str,
        seed: int,
        energy: EnergyScale | None = None,
        score: bool = False,
    ) -> None:
        super().__init__()
        if specs.num_rewards > 1:
            raise ConfigError(
                f"env.vector_reward = True: this agent learns from one reward, not from "
                f"{specs.num_rewards} terms; leave it false, or use an on-policy agent"
            )
        check_groups("agent.latent_dim", settings.widths.latent_dim, settings.simplex_dim)
        self.settings = settings
        self.specs = specs
        self.frames_per_batch = settings.rollout_steps * specs.num_envs
        self.batch_size = settings.batch_size
        self.replay_capacity = settings.replay_capacity
        self.offline_share = settings.offline_share
        gammas = settings.discounts(specs)
        self.window = WindowSpec(
            steps=settings.horizon, gamma=gammas[0], edges="mask", every_step=True
        )
        self.gradient_steps = 0
        self.generator = torch.Generator(device).manual_seed(seed)
        self._acting = torch.Generator(device).manual_seed(derive(seed, "acting"))
        self._features = specs.observation_dim - len(specs.tasks)
        self.model = WorldModel(
            self._features,
            specs.action_dim,
            settings.widths,
            horizon=settings.horizon,
            gamma=gammas,
            energy=energy is not None,
            score=score,
            episodic=settings.episodic,
            simplex_dim=settings.simplex_dim,
            scalar=TwoHot(settings.num_bins, settings.bin_limit),
            action_dims=tuple(task.action_dim for task in specs.tasks),
            task_dim=settings.task_dim,
            generator=self.generator,
        )
        self.energy_scale = energy
        self.register_buffer("value_scale", torch.ones(()))
        self._pace = UpdatePace(settings, specs)
        self._adopted = False
        self._diagnosed: dict[str, Tensor] = {}

    def begin(self, planner: Planner) -> None:
        """Move all networks to their device, and make the optimisers and the policy that acts.

        Args:
            planner: What acts.
        """
        self.to(self.generator.device)
        self.planner = planner
        settings = self.settings
        self._optimizers = optimizers(self.model, settings)
        self._model_loss: Callable[[Window, Draws], ModelLoss] = self.model_loss
        self._policy_loss = self.policy_loss
        if settings.compile:
            self._model_loss = compiled(self.model_loss, name="agent.compile")
            self._policy_loss = compiled(self.policy_loss, name="agent.compile")
            planner.compile("agent.compile", graphs=self.generator.device.type == "cuda")
        self.policy = SearchPolicy(
            self,
            horizon=settings.horizon,
            action_dim=self.specs.action_dim,
            generator=self._acting,
        )
        self.policy.warming_up = self._pace.warming_up

    @torch.no_grad()
    def search(self, observation: Tensor, start: Tensor, generator: torch.Generator) -> Planned:
        """Plan from observations ``[E, d]`` and plans to start from, ``[E, H, A]``."""
        observation, tasks = self.divide(observation)
        task = self.model.task(tasks)
        latent = self.model.encode(observation, task)
        draws = self.planner.draw(len(latent), generator)
        return self.planner.plan(latent, start, draws, task)

    def hide(self, observation: Tensor, action: Tensor) -> Tensor:
        """Return actions ``[E, A]`` with zeros in dimensions that the task does not use."""
        _, tasks = self.divide(observation)
        return self.model.task(tasks).hide(action)

    def divide(self, observation: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the task's simulator shows, ``[..., d]``, and the task's number, ``[...]``.

        The latter is ``None`` where there is one task.
        """
        if not self.specs.tasks:
            return observation, None
        return observation[..., : self._features], observation[..., self._features :].argmax(-1)

    def check_ready(self) -> None:
        """Refuse a task to be like where there is no earlier run that could know it.

        Raises:
            ConfigError: If there is none.
        """
        if self.settings.like_task and not self._adopted:
            raise ConfigError(
                f"agent.like_task = {self.settings.like_task!r}: is a task of the run that init= "
                "names; add init=<run folder>, or leave it out"
            )

    def prepare(self, dataset: OfflineDataset) -> None:
        """Do without a warm-up, unless the settings ask for one: the data are there instead."""
        self._skip_warmup(await_episode=False)

    def adopt(self, weights: Mapping[str, Any], tasks: Sequence[str] = ()) -> Mapping[str, Any]:
        """Return the weights of another run, with the embeddings of this one's tasks.

        A task has the embedding that the other run gave to the task of that name, or else of the
        one that it is like. There is no warm-up then, unless the settings ask for one: the policy
        acts from the first step on, and updates begin, one for each action, when the first episode
        is over (MBDPO, official code). Nothing is made up for.

        Raises:
            ConfigError: If nothing says which tasks the other run had, or which of them a new task
                is like.
        """
        self._adopted = True
        self._skip_warmup(await_episode=True)
        known = weights.get("model.tasks")
        if self.model.tasks is None or known is None:
            return weights
        names = [task.name for task in self.specs.tasks]
        rows = earlier_rows(names, tasks, number=len(known), like=self.settings.like_task)
        return {**weights, "model.tasks": known[rows]}

    def _skip_warmup(self, *, await_episode: bool) -> None:
        self._pace.skip_warmup(await_episode=await_episode)
        self.policy.warming_up = self._pace.warming_up

    def observe(self, rollout: TensorDict) -> int:
        """Take note of new steps; return the updates they call for."""
        updates = self._pace.observe(rollout)
        self.policy.warming_up = self._pace.warming_up
        return updates

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Make one update of the model, then of the policy prior, on windows ``[B]``."""
        window = self.unfold(batch.to(self.generator.device))
        draws = self.draw(window)
        made = self._model_loss(window, draws)
        metrics = made.metrics | self._optimizers["model"].step(made.loss)
        if self.energy_scale is not None:
            self.energy_scale.update(metrics["energy/mean"], metrics["energy/std"])
        loss, scale, learned = self._policy_loss(made.latents, window, draws)
        metrics |= learned | self._optimizers["policy"].step(loss)
        self.value_scale.copy_(torch.where(scale.isfinite(), scale, self.value_scale))
        self.model.follow(self.settings.polyak)
        interval = self.settings.diagnostics_interval
        if interval and self.gradient_steps % interval == 0:
            self._diagnosed = self.diagnose(window, made.encoded)
        self.gradient_steps += 1
        return metrics | self._diagnosed | self.policy.statistics

    def unfold(self, batch: TensorDict) -> Window:
        """Return windows ``[B]`` of a replay time-major, without what does not count."""
        valid = batch["valid"].transpose(0, 1)
        _, tasks = self.divide(batch["observation"])
        observations, _ = self.divide(batch["observations"].transpose(0, 1))
        counts = valid.unsqueeze(-1)
        after = torch.where(counts, observations[1:], observations[:1])
        return Window(
            torch.cat((observations[:1], after)),
            torch.where(counts, batch["action"].transpose(0, 1), 0.0),
            torch.where(valid, batch["rewards"].transpose(0, 1), 0.0),
            batch["terminated"].transpose(0, 1) & valid,
            valid,
            tasks,
        )

    def draw(self, window: Window) -> dict[str, Tensor]:
        """Draw the random numbers of one update by name."""
        horizon, rows, dims = window.actions.shape
        drawn = {
            "target": self.normal(horizon, rows, dims),
            "policy": self.normal(horizon + 1, rows, dims),
        }
        critics = self.model.critics
        for name in ("target_critics", "policy_critics"):
            if (members := two_critics(self.model, 1, self.generator)) is not None:
                drawn[name] = members[0]
        if self.settings.target_critics == "first" and "target_critics" in drawn:
            drawn["target_critics"] = torch.arange(2, device=self.generator.device)
        if self.settings.dropout > 0:
            shape = (critics.num_members, horizon * rows, critics.hidden[0])
            drawn["dropout"] = dropout_mask(shape, self.settings.dropout, self.generator)
        return drawn

    def normal(self, *shape: int) -> Tensor:
        """Draw standard normal numbers."""
        return torch.randn(shape, generator=self.generator, device=self.generator.device)

    def some_rows(self, number: int, among: int) -> Tensor:
        """Draw the numbers of different rows of a batch, all if there are no more, int64 ``[R]``.

        The first ones would not do: windows of a data set stand before those that were collected.
        """
        order = torch.randperm(among, generator=self.generator, device=self.generator.device)
        return order[:number]

    def model_loss(self, window: Window, draws: Draws) -> ModelLoss:
        """Return the loss of all networks but the policy (official codes of TD-MPC2 and MBDPO).

        Args:
            window: What to learn from.
            draws: Of :meth:`draw`.
        """
        settings, model = self.settings, self.model
        task, decay, valid = model.task(window.tasks), settings.horizon_decay, window.valid
        with torch.no_grad():
            encoded = model.encode(window.observations[1:], task)
            following = self.next_action(encoded, window, draws, task)
            target = td_target(
                window.rewards,
                window.terminated,
                self.target_values(encoded, following, draws, task),
                task.gamma,
            )
        latents = model.imagine(model.encode(window.observations[0], task), window.actions, task)
        inputs = model.pair(latents[:-1], window.actions, task)
        reward_logits = model.reward(inputs)
        value_logits = model.critics(inputs, mask=draws.get("dropout"))
        consistency = consistency_loss(latents[1:], encoded, valid, decay)
        reward = two_hot_loss(model.scalar, reward_logits, window.rewards, valid, decay)
        value = two_hot_loss(model.scalar, value_logits, target, valid, decay)
        loss = (
            settings.consistency_weight * consistency
            + settings.reward_weight * reward
            + settings.value_weight * value
        )
        metrics = {
            "loss/consistency": consistency.detach(),
            "loss/reward": reward.detach(),
            "loss/value": value.detach(),
            "value/target": weighted_mean(target, valid),
        }
        if model.termination is not None:
            ends = model.termination(model.state(latents[1:], task)).squeeze(-1)
            wrong = F.binary_cross_entropy_with_logits(
                ends, window.terminated.float(), reduction="none"
            )
            termination = weighted_mean(wrong, valid)
            loss = loss + settings.termination_weight * termination
            metrics["loss/termination"] = termination.detach()
        more, besides = self.further_loss(latents.detach(), window, draws, task)
        if more is not None:
            loss = loss + more
        return ModelLoss(loss, latents.detach(), encoded, metrics | besides)

    def next_action(self, encoded: Tensor, window: Window, draws: Draws, task: Task) -> Tensor:
        """Return the actions at next states that targets ask about, ``[H, B, A]``.

        Here those of the policy prior.

        Args:
            encoded: Next latents, ``[H, B, L]``.
            window: Where they come from.
            draws: Of :meth:`draw`.
            task: Of each row.
        """
        return self.model.act(encoded, draws["target"], task).action

    def target_values(self, latent: Tensor, action: Tensor, draws: Draws, task: Task) -> Tensor:
        """Return values of the averaged critics that targets take the least of, ``[2, ..., B]``."""
        members = draws.get("target_critics")
        return self.model.values(latent, action, task, members=members, averaged=True)

    def further_loss(
        self, latents: Tensor, window: Window, draws: Draws, task: Task
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Return what else the model learns, and metrics.

        Args:
            latents: Open-loop, constants, ``[H + 1, B, L]``.
            window: What is learned from.
            draws: Of :meth:`draw`.
            task: Of each row.
        """
        return None, {}

    def policy_loss(
        self, latents: Tensor, window: Window, draws: Draws
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss of the policy prior, the new scale of its values, and metrics.

        Args:
            latents: Open-loop, constants, ``[H + 1, B, L]``.
            window: What they come from.
            draws: Of :meth:`draw`.
        """
        settings, model = self.settings, self.model
        task = model.task(window.tasks)
        drawn = model.act(latents, draws["policy"], task)
        members = draws.get("policy_critics")
        values = model.values(latents, drawn.action, task, members=members, frozen=True).mean(0)
        new = value_range(values[0].detach())
        scale = torch.lerp(self.value_scale, new, settings.polyak)
        entropy = scaled_entropy(draws["policy"], drawn.log_std, task.mask)
        there = torch.cat((window.valid[:1], window.valid))
        loss = policy_prior_loss(
            values,
            entropy,
            there,
            scale=scale,
            entropy_weight=settings.entropy_weight,
            decay=settings.horizon_decay,
        )
        metrics = {
            "loss/policy": loss.detach(),
            "policy/std": drawn.log_std.detach().exp().mean(),
            "value/policy": over_horizon(values.detach()[:1], there[:1], 1.0),
            "value/scale": scale.detach(),
        }
        return loss, scale.detach(), metrics

    @torch.no_grad()
    def diagnose(self, window: Window, encoded: Tensor) -> dict[str, Tensor]:
        """Return how far the acting search lies from the policy prior, on states of the replay.

        The search begins from the actions that were taken from there on. See
        :func:`~genpol.world_model.diagnostics.search_drift`.

        Args:
            window: What was learned from.
            encoded: Next latents, ``[H, B, L]``.
        """
        rows = self.some_rows(self.settings.diagnostics_rows, encoded.shape[1])
        task, latent = self.model.task(window.tasks).rows(rows), encoded[0, rows]
        draws = self.planner.draw(len(rows), self.generator)
        searched = self.planner.plan(latent, window.following()[0, rows], draws, task).action
        own = self.model.act(latent, None, task).action
        critics = two_critics(self.model, 1, self.generator)
        ask: Draws = {} if critics is None else {"target_critics": critics[0]}
        reward, terminated = window.rewards[0, rows], window.terminated[0, rows]
        here, there = (
            td_target(reward, terminated, self.target_values(latent, a, ask, task), task.gamma)
            for a in (searched, own)
        )
        width = task.width(self.specs.action_dim)
        return search_drift(searched, own, (here, there), width, window.valid[0, rows])

    def training_state(self) -> dict[str, Any]:
        """Return optimisers, counters, generators, and the plans that are being carried out."""
        return {
            "optimizers": {name: x.state_dict() for name, x in self._optimizers.items()},
            "generator": self.generator.get_state(),
            "gradient_steps": self.gradient_steps,
            **self._pace.state(),
            "diagnosed": dict(self._diagnosed),
            "acting": self.policy.acting_state(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""
        for name, optimizer in self._optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self.generator.set_state(state["generator"].cpu())
        self.gradient_steps = state["gradient_steps"]
        self._pace.load_state(state)
        self.policy.warming_up = self._pace.warming_up
        self._diagnosed = {
            name: x.to(self.generator.device) for name, x in state["diagnosed"].items()
        }
        self.policy.load_acting_state(state["acting"])
