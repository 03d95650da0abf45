"""Generative online reinforcement learning (GoRL) with a flow or diffusion decoder.

arXiv 2512.02581. The policy is a Gaussian *encoder* ``z ~ pi(z | s)`` followed by a generative
*decoder* ``a = g(s, z)``; the environment receives ``tanh(a)``. Stages alternate two phases:

1. PPO on ``z`` with the decoder frozen (:mod:`genpol.on_policy`); stage 0 has the identity as
   decoder and is plain Gaussian PPO.
2. With the encoder frozen, rollouts ``(s, a)`` are collected and a *fresh* decoder is regressed
   onto them, e.g. by flow matching ``E |v(s, x_t, t) - (a - eps)|^2``, from noise ``eps ~ N(0, I)``
   that is independent of the ``z`` which produced ``a``. Then the encoder restarts at N(0, I), so
   that exploration begins anew around the behaviour that the decoder has absorbed.

Choices where paper and released code disagree, and why:

* Refinement data are steps of the running environments, counted as training steps, in place of
  extra episodes outside the budget. The environments' clocks are staggered, so that with episodes
  of a fixed length both have the same distribution over episode time.
* The encoder's observation statistics restart from the refinement data and not from nothing.
* Targets are clipped to +-3 before the squash (tanh 3 = 0.995): the tails differ in nothing that
  the environment can see.
* Actor and critic have optimisers and gradient clips of their own, so the value loss needs no
  coefficient; the actor's step size follows the measured divergence (released: fixed).
* Advantages are the textbook's; the released code's are ``advantage=brax``.
* The decoder is fitted with one noise draw a row (released: 8), at full output scale (released:
  0.25 for epsilon-delta); it is handed the last encoder's data, not those of the best.
* Controls are settings: ``decoder=identity`` (restarts without a generator), ``restart=warm_start``
  (generator without restarts), ``decoder=gaussian`` (restarts around a unimodal decoder).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from genpol import parallel
from genpol import settings as check
from genpol.agent import Specs
from genpol.errors import ConfigError, NonFiniteError
from genpol.nn.optimizer import GuardedOptimizer, half_cosine
from genpol.on_policy import (
    DecodedAgent,
    DecodedPolicy,
    Encoder,
    GaussianSettings,
    OnPolicyLearner,
    gaussian_learner,
)
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy
from genpol.policies.latent import GaussianDecoder, IdentityDecoder
from genpol.policies.schedules import gorl_linear_schedule

GenerativeDecoder = FlowPolicy | DiffusionPolicy | GaussianDecoder

_RESTARTS = ("gaussian", "gaussian_warm_value", "fresh", "warm_start")


@dataclass(frozen=True, kw_only=True)
class Settings(GaussianSettings):
    """Hyper-parameters of GoRL."""

    decoder: str = "flow"
    """Generator: `flow`, `diffusion`, or the controls `gaussian` and `identity`."""
    restart: str = "gaussian"
    """Encoder after a refinement: `gaussian` (exactly N(0, I)), `gaussian_warm_value` (critic
    kept), `fresh` (random weights) or `warm_start` (everything but the optimiser kept)."""
    stage_steps: list[int] = field(default_factory=lambda: [3_000_000])
    """Environment steps of each stage; the last entry repeats."""
    max_refinements: int = 2
    """Refinements after which the decoder stays as it is."""
    refinement_steps: int = 500_000
    """Environment steps collected for one refinement."""
    decoder_hidden: list[int] = field(default_factory=lambda: [64, 64, 64, 64])
    """Widths of the decoder's hidden layers."""
    solver_steps: int = 10
    """Steps of the decoder's ODE or denoising chain."""
    fit_steps: int = 5000
    """Optimiser steps of one refinement."""
    fit_batch_size: int = 4096
    """Rows per such step."""
    fit_learning_rate: float = 1e-3
    """Adam step size at the start of a refinement; it decays to zero along a cosine."""
    target_clip: float = 3.0
    """Bound on the regression target before the squash; 0 for none."""
    coupled: bool = False
    """Ablation: train the decoder on the row's own latent in place of fresh noise."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.decoder", self.decoder, ("flow", "diffusion", "gaussian", "identity"))
        check.one_of("agent.restart", self.restart, _RESTARTS)
        for name in ("solver_steps", "fit_steps", "fit_batch_size", "fit_learning_rate"):
            check.positive(f"agent.{name}", getattr(self, name))
        check.positive("agent.refinement_steps", self.refinement_steps)
        check.widths("agent.decoder_hidden", self.decoder_hidden)
        check.at_least("agent.max_refinements", self.max_refinements, 0)
        check.at_least("agent.target_clip", self.target_clip, 0.0)
        if self.squashed_entropy and self.decoder != "identity":
            raise ConfigError(
                "agent.squashed_entropy = True: a fitted decoder leaves the action's entropy "
                "unknown; set agent.decoder=identity, or agent.squashed_entropy=false"
            )
        if not self.stage_steps or min(self.stage_steps) <= 0:
            raise ConfigError(
                f"agent.stage_steps = {list(self.stage_steps)}: must be positive step counts, "
                "such as [4000000, 4000000]"
            )


class GoRL(DecodedAgent):
    """Prior and mapping in turn: PPO on a latent, then regression of the decoder.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights, exploration, minibatches and regression noise.
    """

    source = "rollout"

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        super().__init__()
        self.settings = settings
        self.specs = specs
        self.device = torch.device(device)
        self.frames_per_batch = settings.frames_per_batch(specs)
        self.generator = torch.Generator(device).manual_seed(seed)
        encoder = self._make_encoder(settings.encoder_init)
        self.policy = DecodedPolicy(
            encoder,
            IdentityDecoder(settings.action_gain),
            generator=self.generator,
            noise_correlation=settings.noise_correlation,
        )
        self.learner = self._make_learner(encoder)
        self.stage = 0
        self._steps_in_stage = 0
        self._fit_gradient_steps = 0
        self._skipped = 0
        self._collected: list[TensorDict] = []

    def check_ranks(self) -> None:
        """See :class:`~genpol.agent.Agent`."""
        self.settings.check_ranks()

    @property
    def gradient_steps(self) -> int:  # type: ignore[override]
        """Optimiser steps so far, of encoder and decoders together."""
        return self.learner.gradient_steps + self._fit_gradient_steps

    def update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Improve the encoder, or, at the end of a stage, gather data for the next decoder."""
        self._steps_in_stage += batch.numel() * self.specs.action_repeat * parallel.size()
        if self._steps_in_stage <= self._stage_length():
            metrics = self.learner.update(batch)
        else:
            metrics = self._collect(batch)
        metrics["skipped_updates"] = torch.tensor(float(self._skipped + self.learner.skipped))
        return metrics | {"stage": torch.tensor(float(self.stage))}

    def _stage_length(self) -> float:
        if self.stage >= self.settings.max_refinements:
            return float("inf")
        lengths = self.settings.stage_steps
        return lengths[min(self.stage, len(lengths) - 1)]

    def _collect(self, batch: TensorDict) -> dict[str, Tensor]:
        # Every rank keeps what all have collected, and so fits the same decoder.
        self._collected.append(torch.cat(parallel.gather(_refinement_data(batch))))
        collected = sum(part.numel() for part in self._collected) * self.specs.action_repeat
        if collected < self.settings.refinement_steps:
            return {}
        data = torch.cat(self._collected, dim=1)
        self._collected = []
        metrics = self._refine(data)
        self.stage += 1
        self._steps_in_stage = 0
        return metrics

    def _refine(self, data: TensorDict) -> dict[str, Tensor]:
        """Fit a fresh decoder to ``data [num_envs, time]`` and restart the encoder around it."""
        settings = self.settings
        metrics: dict[str, Tensor] = {}
        if settings.decoder != "identity":
            decoder = self.make_decoder().to(self.device)
            metrics = fit_decoder(decoder, data, settings, self.generator)
            self._fit_gradient_steps += settings.fit_steps
            self.policy.decoder = decoder.requires_grad_(False)
        encoder = self.policy.encoder
        if settings.restart != "warm_start":
            init = "fresh" if settings.restart == "fresh" else "gaussian"
            encoder = self._make_encoder(init)
            if settings.restart == "gaussian_warm_value":
                encoder.copy_critics(self.policy.encoder)
            else:
                encoder.normalizer.update(data["observation"], mask=~data["diverged"].squeeze(-1))
                encoder.copy_critic_statistics(self.policy.encoder)
        self.policy.encoder = encoder
        self._skipped += self.learner.skipped
        learner = self._make_learner(encoder)
        learner.continue_from(self.learner)
        self.learner = learner
        return metrics

    def _make_encoder(self, init: str) -> Encoder:
        specs = self.specs
        encoder = Encoder(
            specs.observation_dim,
            specs.action_dim,
            self.settings,
            generator=self.generator,
            init=init,
            num_values=self.settings.num_values(specs),
            critic_observation_dim=specs.critic_observation_dim,
        )
        return encoder.to(self.device)

    def _make_learner(self, encoder: Encoder) -> OnPolicyLearner:
        return gaussian_learner(encoder, self.settings, specs=self.specs, generator=self.generator)

    def make_decoder(self) -> GenerativeDecoder:
        """Return a freshly initialised decoder of the kind that the settings name."""
        specs, settings = self.specs, self.settings
        sizes = (specs.observation_dim, specs.action_dim, settings.decoder_hidden)
        if settings.decoder == "flow":
            return FlowPolicy(*sizes, num_steps=settings.solver_steps, generator=self.generator)
        if settings.decoder == "diffusion":
            return DiffusionPolicy(
                *sizes,
                schedule=gorl_linear_schedule(settings.solver_steps),
                prediction="epsilon_delta",
                generator=self.generator,
            )
        return GaussianDecoder(*sizes, generator=self.generator)

    def training_state(self) -> dict[str, Any]:
        """Return optimisers, the stage machine, data collected so far and the generator."""
        return {
            "learner": self.learner.state(),
            "generator": self.generator.get_state(),
            "noise": self.policy.noise,
            "stage": self.stage,
            "steps_in_stage": self._steps_in_stage,
            "fit_gradient_steps": self._fit_gradient_steps,
            "skipped": self._skipped,
            "collected": [dict(part.items()) for part in self._collected],
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`training_state` returned."""
        self.learner.load_state(state["learner"])
        self.generator.set_state(state["generator"])
        self.policy.load_noise(state["noise"])
        self.stage = state["stage"]
        self._steps_in_stage = state["steps_in_stage"]
        self._fit_gradient_steps = state["fit_gradient_steps"]
        self._skipped = state["skipped"]
        self._collected = [
            TensorDict(part, batch_size=part["observation"].shape[:2], device=self.device)
            for part in state["collected"]
        ]

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load weights; a decoder is created first if the weights hold one."""
        if any(name.startswith("policy.decoder.") for name in state_dict) and isinstance(
            self.policy.decoder, IdentityDecoder
        ):
            self.policy.decoder = self.make_decoder().to(self.device).requires_grad_(False)
        return super().load_state_dict(state_dict, *args, **kwargs)


def fit_decoder(
    decoder: GenerativeDecoder, data: TensorDict, settings: Settings, generator: torch.Generator
) -> dict[str, Tensor]:
    """Regress ``decoder`` onto the actions in ``data`` and keep its best validation weights.

    A tenth of the environments, whole, is held out for validation; of fewer than ten, the last
    tenth of time.

    Args:
        decoder: Freshly initialised; its observation statistics are set from the training rows.
        data: ``observation``, ``latent`` and ``decoded``, each ``[num_envs, time, ...]``.
        settings: Hyper-parameters.
        generator: Source of rows, noise and times.

    Returns:
        Losses at the end of the fit.

    Raises:
        NonFiniteError: If losses stay non-finite, or no validation loss was finite.
    """
    training, validation = _split(data, settings, generator)
    decoder.normalizer.update(training["observation"])
    optimizer = GuardedOptimizer(
        decoder.parameters(),
        settings.fit_learning_rate,
        max_grad_norm=math.inf,
        eps=1e-8,
        patience=settings.nonfinite_patience,
        name="decoder",
    )
    fixed_noise = _noise(validation, settings, generator)
    fixed_time = decoder.draw_time(fixed_noise.shape[:1], generator)
    best, best_weights = math.inf, _copy(decoder)
    every = max(1, settings.fit_steps // 20)
    for step in range(1, settings.fit_steps + 1):
        picked = torch.randint(
            len(training), (settings.fit_batch_size,), generator=generator, device=generator.device
        )
        rows = training[picked]
        time = decoder.draw_time(rows.shape, generator)
        noise = _noise(rows, settings, generator)
        loss, _ = decoder.bc_loss(rows["observation"], rows["decoded"], noise, time)
        done = (step - 1) / settings.fit_steps
        optimizer.learning_rate = half_cosine(settings.fit_learning_rate, 0.0, done)
        optimizer.step(loss)
        if step % every == 0 or step == settings.fit_steps:
            with torch.no_grad():
                error, _ = decoder.bc_loss(
                    validation["observation"], validation["decoded"], fixed_noise, fixed_time
                )
            if error < best:
                best, best_weights = float(error), _copy(decoder)
    if not math.isfinite(best):
        raise NonFiniteError(
            "decoder: its validation loss was never finite; lower agent.fit_learning_rate and look "
            "for extreme observations"
        )
    decoder.load_state_dict(best_weights)
    return {
        "decoder/loss": loss.detach(),
        "decoder/validation_loss": torch.tensor(best),
        "decoder/target_std": training["decoded"].std(),
    }


def _refinement_data(batch: TensorDict) -> TensorDict:
    data = batch.select("observation", "latent", "decoded").clone()
    return data.set("diverged", batch["next", "diverged"].clone())


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: x.clone() for name, x in module.state_dict().items()}


def _split(
    data: TensorDict, settings: Settings, generator: torch.Generator
) -> tuple[TensorDict, TensorDict]:
    """Return rows for training and for validation."""
    num_envs, time = data.shape
    if num_envs < 10:
        late = max(1, time // 10)
        return _rows(data[:, :-late], settings), _rows(data[:, -late:], settings)
    order = torch.randperm(num_envs, generator=generator, device=generator.device)
    held_out = num_envs // 10
    return _rows(data[order[held_out:]], settings), _rows(data[order[:held_out]], settings)


def _rows(data: TensorDict, settings: Settings) -> TensorDict:
    rows = data.flatten(0, 1)
    rows = rows[~rows["diverged"].squeeze(-1)]
    if settings.target_clip > 0:
        rows["decoded"] = rows["decoded"].clamp(-settings.target_clip, settings.target_clip)
    return rows


def _noise(rows: TensorDict, settings: Settings, generator: torch.Generator) -> Tensor:
    if settings.coupled:
        return rows["latent"]
    return torch.empty_like(rows["latent"]).normal_(generator=generator)


AGENT = GoRL
