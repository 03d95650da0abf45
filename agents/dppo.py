"""Diffusion policy policy optimisation (DPPO): policy gradients through the denoising chain.

Ren et al. 2024 (arXiv 2409.00588): each denoising step is an action of an inner decision process
with a Gaussian likelihood, and the reward comes with the last one. A step's ratio is
``pi(x_{k+1} | s, x_k) / pi_old(x_{k+1} | s, x_k)``; each step is clipped on its own and they are
averaged (``ratio=step``), with the same advantage for all, discounted towards the noisy ones by
``denoising_discount``. ``ratio=path`` multiplies the ratios of a chain, which is the likelihood
ratio of the whole action (and what the theory of BPO needs). The environment receives the tanh of
the chain's end; the first noise is not in the likelihood.

``denoiser=flow`` is the form that FPO and GoRL compare with: Euler steps of a flow with noise
of standard deviation ``sigma``. ``denoiser=diffusion`` is DDPM on a cosine schedule whose standard
deviations have ``sigma`` as a floor, 0.1 in the paper.

Deviations: log-densities are summed over action dimensions (``per_dimension`` averages them, as
released) and not clamped one by one; a log-ratio is, to +-20. Every step is trained by one network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from genpol import settings as check
from genpol.agent import Specs
from genpol.errors import ConfigError
from genpol.on_policy import DenoisingAgent, DenoisingSettings, Evaluation, Likelihood, Rows
from genpol.policies.chain import Chain, ChainSettings
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy
from genpol.policies.gaussian import log_prob
from genpol.policies.schedules import diffusers_schedule


@dataclass(frozen=True, kw_only=True)
class Settings(DenoisingSettings):
    """Hyper-parameters of DPPO."""

    denoiser: str = "flow"
    """`flow` or `diffusion`."""
    sigma: float = 0.05
    """Standard deviation of each step (flow), or its least one (diffusion; paper: 0.1)."""
    ratio: str = "step"
    """A likelihood ratio for each denoising `step`, or one for the whole `path`."""
    per_dimension: bool = False
    """Whether log-densities are averaged over the action's dimensions, as released."""
    denoising_discount: float = 1.0
    """Factor on the advantage for every step between a denoising step and the last."""
    clip_base: float = 0.0
    """Clip of the noisiest step, from which it grows to `clip`; 0 for the same throughout."""
    noise_clip: float = 3.0
    """Bound on the absolute noise of a step, in standard deviations."""
    clean_clip: float = 3.0
    """Bound on the clean estimate before the squash (diffusion); 0 for none."""
    learning_rate: float = 3e-4
    """Adam step size of the actor."""
    critic_learning_rate: float = 3e-4
    """Adam step size of the critic."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.denoiser", self.denoiser, ("flow", "diffusion"))
        check.one_of("agent.ratio", self.ratio, ("step", "path"))
        check.positive("agent.sigma", self.sigma)
        check.positive("agent.noise_clip", self.noise_clip)
        check.within("agent.denoising_discount", self.denoising_discount, 0.0, 1.0)
        for name in ("clip_base", "clean_clip"):
            check.at_least(f"agent.{name}", getattr(self, name), 0.0)
        check.within("agent.clip_base", self.clip_base, 0.0, self.clip)
        if self.surrogate == "bpo" and self.bpo.weight == "online" and self.denoising_discount < 1:
            raise ConfigError(
                f"agent.denoising_discount = {self.denoising_discount!r}: weighs advantages, which "
                "surrogate=bpo takes from its critic; set agent.bpo.weight=stored"
            )


class ChainLikelihood(Likelihood):
    """The Gaussian transitions of a denoising chain.

    Args:
        actor: The flow or diffusion model.
        settings: How ratios are formed.
    """

    def __init__(self, actor: FlowPolicy | DiffusionPolicy, settings: Settings) -> None:
        self.actor = actor
        self.settings = settings
        self.chain = make_chain(actor, settings)
        steps = torch.arange(actor.num_steps)
        self._weight = settings.denoising_discount ** (actor.num_steps - 1 - steps)
        self._clip = clip_schedule(actor.num_steps, settings.clip_base, settings.clip)

    def keep(self, batch: TensorDict, observation: Tensor) -> dict[str, Tensor]:
        """Return the chains, the means of their steps, and log-densities as they are now."""
        kept = {"observation_raw": batch["observation"], "chain": batch["chain"]}
        mean, std = self._transitions(self.actor, kept)
        return kept | {"log_prob": self._density(kept, mean, std), "mean": mean}

    def evaluate(self, rows: Rows) -> Evaluation:
        """See :class:`~genpol.on_policy.likelihood.Likelihood`."""
        mean, std = self._transitions(self.actor, rows)
        density = self._density(rows, mean, std)
        by_step = self.settings.ratio == "step"
        return Evaluation(
            log_prob=density,
            regulariser=density.new_zeros(()),
            divergence=lambda: self._reduced(((mean - rows["mean"]) / std).square() / 2),
            metrics={"policy/chain_std": std.mean()},
            step_weight=self._weight.to(density) if by_step else None,
            step_clip=self._clip.to(density) if by_step and self.settings.clip_base else None,
        )

    def log_prob(self, actor: nn.Module, rows: Rows) -> Tensor:
        """See :class:`~genpol.on_policy.likelihood.Likelihood`."""
        return self._density(rows, *self._transitions(actor, rows))

    def _transitions(self, actor: nn.Module, rows: Rows) -> tuple[Tensor, Tensor]:
        assert isinstance(actor, FlowPolicy | DiffusionPolicy)
        return self.chain.transitions(actor, rows["observation_raw"], rows["chain"])

    def _density(self, rows: Rows, mean: Tensor, std: Tensor) -> Tensor:
        density = log_prob(mean, std, rows["chain"][..., 1:, :])
        if self.settings.per_dimension:
            density = density / mean.shape[-1]
        return density if self.settings.ratio == "step" else density.sum(-1)

    def _reduced(self, divergence: Tensor) -> Tensor:
        total = divergence.mean(-1) if self.settings.per_dimension else divergence.sum(-1)
        return total if self.settings.ratio == "step" else total.sum(-1)


def clip_schedule(num_steps: int, base: float, top: float) -> Tensor:
    """Return ``c_k = base + (top - base) (e^{3 k / (K - 1)} - 1) / (e^3 - 1)``, ``[K]``.

    The noisiest step, k = 0, is clipped the most tightly (DPPO, arXiv 2409.00588, appendix).
    """
    share = torch.arange(num_steps) / max(1, num_steps - 1)
    return base + (top - base) * torch.expm1(3.0 * share) / math.expm1(3.0)


def make_chain(actor: FlowPolicy | DiffusionPolicy, settings: Settings) -> Chain:
    """Return the actor's chain with the same noise in every step, and no correction for it."""
    noise = ChainSettings(
        sigma=settings.sigma,
        schedule="constant",
        correction="none",
        clip=0.0,
        noise_clip=settings.noise_clip,
    )
    return Chain(actor, noise)


class DPPO(DenoisingAgent):
    """PPO through the denoising chain."""

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        actor = _make_actor(settings, specs, generator)
        likelihood = ChainLikelihood(actor, settings)
        super().__init__(
            settings,
            specs,
            actor=actor,
            likelihood=likelihood,
            generator=generator,
            chain=likelihood.chain,
        )


def _make_actor(
    settings: Settings, specs: Specs, generator: torch.Generator
) -> FlowPolicy | DiffusionPolicy:
    sizes = (specs.observation_dim, specs.action_dim, settings.actor_hidden)
    if settings.denoiser == "flow":
        return FlowPolicy(*sizes, num_steps=settings.solver_steps, generator=generator)
    return DiffusionPolicy(
        *sizes,
        schedule=diffusers_schedule(
            num_levels=settings.solver_steps, num_steps=settings.solver_steps
        ),
        sampler="ddpm",
        clip=settings.clean_clip or None,
        generator=generator,
    )


AGENT = DPPO
