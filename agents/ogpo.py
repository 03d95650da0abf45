"""Off-policy generative policy optimisation (OGPO): finetuning of a flow or diffusion policy.

Patil et al. 2026 (arXiv 2605.03065). A critic ensemble learns off-policy from everything the policy
ever did. The policy is improved in its own denoising process alone: for states of the replay, G
chains each are drawn from its running average, the averaged critics score their ends, and PPO's
clipped ratio of chain likelihoods follows the advantage over the group's mean. No gradient of the
critic, no state value, no fresh rollouts.

``preset`` chooses what the paper compares:

=============== ============ ============ ======= ==================================================
``preset``      advantage    BC on        best of
                             successes
=============== ============ ============ ======= ==================================================
``ogpo``        mean         0            1       vanilla
``ogpo_plus``   mean         1            8       OGPO+: also imitates its own successful episodes
``ogpo_ca``     conservative 1            8       OGPO+CA: believes what all critics agree on
``reproduce``   conservative 1            8       the released code: correction of the drift K times
                                                  too small; critics at the policy's step size,
                                                  after it, and on successes once more; imitation of
                                                  anything before there are successes
=============== ============ ============ ======= ==================================================

The log-ratio of a chain is divided by ``(K + 1) H A`` (``normalize_ratio``), as released, so that
``clip`` means the same for all chains; the paper's formula has the product itself.

Diffusion policies have DPPO's chain, with ``sigma`` as the least standard deviation (the
released code has flows only). ``last_steps`` finetunes the end of the chain alone.

Deviations: Adam without weight decay (released: 1e-5 on the critics); likelihoods are those of the
chain's end before it is clipped to the action's range; before there are successes nothing is
imitated. Not here: the chi-squared regularisation and HL-Gauss critics of the experiments from
pixels, which are off in all of the paper's experiments from states.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from genpol import settings as check
from genpol.agent import Specs
from genpol.finetuning import FinetuneSettings, FinetuningAgent
from genpol.finetuning.agent import Parts, follow
from genpol.nn.optimizer import half_cosine
from genpol.objectives.critic_groups import ADVANTAGES, group_advantage
from genpol.objectives.surrogates import clamped_log_ratio, ppo_clip
from genpol.offline.behaviour import as_chunk, draw_imitation, imitation_loss, sample_chunks
from genpol.offline.chunk_agent import Draws, Windows
from genpol.policies.chain import CORRECTIONS, Chain, ChainSettings
from genpol.policies.diffusion import DiffusionPolicy
from genpol.policies.flow import FlowPolicy
from genpol.policies.guidance import best_of
from genpol.pretrained import PretrainedPolicy


@dataclass(frozen=True, kw_only=True)
class Variant:
    """What the presets differ in; see the module."""

    advantage: str = "mean"
    bc_weight: float = 0.0
    best_of: int = 1
    correction: str = "marginal"
    success_critic: bool = False
    imitate_anything: bool = False
    policy_first: bool = False
    critic_at_policy_rate: bool = False


_PLUS = Variant(bc_weight=1.0, best_of=8)
_CA = replace(_PLUS, advantage="conservative")
PRESETS = {
    "ogpo": Variant(),
    "ogpo_plus": _PLUS,
    "ogpo_ca": _CA,
    "reproduce": replace(
        _CA,
        correction="official",
        success_critic=True,
        imitate_anything=True,
        policy_first=True,
        critic_at_policy_rate=True,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Settings(FinetuneSettings):
    """Hyper-parameters of OGPO. What may be null is the preset's unless it is set."""

    decays: ClassVar[bool] = True

    preset: str = "ogpo_ca"
    """`ogpo`, `ogpo_plus`, `ogpo_ca` or `reproduce`; see the module."""
    advantage: str | None = None
    """Of a group's actions: over the critics' `mean` or `min`, `conservative`, or `second`."""
    bc_weight: float | None = None
    """Weight of the imitation of successful episodes; 0 for none."""
    best_of: int | None = None
    """Candidates for each chunk that is carried out, of which the critics choose."""
    correction: str | None = None
    """Of the flow's drift for the chain's noise: `marginal`, `official` or `none`."""
    success_critic: bool | None = None
    """Whether the critics take a second step on windows of successful episodes."""
    sigma: float = 0.05
    """Noise of a flow's chain, see `noise_schedule`; of a diffusion model's the least standard
    deviation."""
    noise_schedule: str = "tapered"
    """A flow's standard deviations: sigma sqrt(1 - t) at time t (`tapered`), or `constant`."""
    noise_clip: float = 3.0
    """Bound on the absolute draws of the chain, in standard deviations."""
    mean_clip: float = 1.0
    """Bound on the absolute means of a flow's steps; 0 for none."""
    group_size: int = 32
    """Chains G per state, over whose mean the advantage is taken."""
    policy_batch_size: int = 256
    """States per update of the policy."""
    clip: float = 0.01
    """Bound of the likelihood ratio's distance from 1."""
    normalize_ratio: bool = True
    """Whether a chain's log-ratio is divided by (K + 1) H A, as released."""
    last_steps: int = 0
    """Steps of the chain whose likelihood counts, the last ones; 0 for all."""
    learning_rate: float = 4.5e-5
    """Adam step size of the policy after the warm-up."""
    warmup_updates: int = 2_000
    """Updates of the policy over which its step size rises to that."""
    final_learning_rate: float = 2e-5
    """Adam step size of the policy at the end of its decay, a half cosine."""
    decay_updates: int = 50_000
    """Updates of the policy after the warm-up over which it falls to that."""
    policy_polyak: float = 0.005
    """Share of the live policy in every update of the averaged one, which acts."""
    success_batch_size: int = 256
    """Windows of successful episodes per update."""

    def __post_init__(self) -> None:
        """Refuse values out of bounds."""
        super().__post_init__()
        check.one_of("agent.preset", self.preset, PRESETS)
        variant = self.variant
        check.one_of("agent.advantage", variant.advantage, ADVANTAGES)
        check.one_of("agent.correction", variant.correction, CORRECTIONS)
        check.at_least("agent.best_of", variant.best_of, 1)
        check.at_least("agent.bc_weight", variant.bc_weight, 0.0)
        check.at_least("agent.group_size", self.group_size, 2)
        for name in ("success_batch_size", "decay_updates"):
            check.at_least(f"agent.{name}", getattr(self, name), 1)
        check.within("agent.policy_batch_size", self.policy_batch_size, 1, self.batch_size)
        check.at_least("agent.warmup_updates", self.warmup_updates, 0)
        for name in ("clip", "final_learning_rate"):
            check.positive(f"agent.{name}", getattr(self, name))
        check.within("agent.policy_polyak", self.policy_polyak, 0.0, 1.0)
        check.within("agent.last_steps", self.last_steps, 0, self.solver_steps)
        self.noise(variant.correction)

    @property
    def variant(self) -> Variant:
        """The preset, with what is set besides."""
        own = {x.name: getattr(self, x.name, None) for x in fields(Variant)}
        return replace(PRESETS[self.preset], **{k: v for k, v in own.items() if v is not None})

    def noise(self, correction: str) -> ChainSettings:
        """Return the noise of the chains."""
        return ChainSettings(
            sigma=self.sigma,
            schedule=self.noise_schedule,
            correction=correction,
            clip=self.mean_clip,
            noise_clip=self.noise_clip,
        )


class OGPO(FinetuningAgent):
    """PPO through the denoising chain, with critics of a replay for the reward.

    Attributes:
        average: The running average of the actor, from which every chain is drawn.

    Args:
        settings: Hyper-parameters.
        specs: Sizes of the environment.
        device: Where the networks live.
        seed: Seed of weights and noise.
    """

    settings: Settings

    def __init__(self, settings: Settings, specs: Specs, *, device: str, seed: int) -> None:
        variant = settings.variant
        wins = settings.success_batch_size * (variant.bc_weight > 0 or variant.success_critic)
        super().__init__(settings, specs, device=device, seed=seed, successes=wins)
        self.variant = variant
        self.average = copy.deepcopy(self.actor).requires_grad_(False)
        self.chain = Chain(self.actor, settings.noise(variant.correction))
        width = settings.horizon * specs.action_dim
        self._normalizer = (settings.solver_steps + 1) * width if settings.normalize_ratio else 1
        self._policy_updates = 0
        self.begin()
        self._sample_group = self.compiled(self.sample_group)
        self._policy_loss = self.compiled(self.policy_loss)

    def parts(self) -> Parts:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        settings = self.settings
        by_policy = self.variant.critic_at_policy_rate
        rate = settings.learning_rate if by_policy else settings.critic_learning_rate
        return {
            "critic": ([*self.critic.parameters()], rate),
            "policy": ([*self.actor.parameters()], settings.learning_rate),
        }

    @property
    def behaviour(self) -> FlowPolicy | DiffusionPolicy:
        """See :class:`~genpol.pretrained.PolicyHolder`: the average."""
        return self.average

    def load_policy(self, policy: PretrainedPolicy) -> None:
        """See :class:`~genpol.pretrained.PolicyHolder`."""
        super().load_policy(policy)
        self.actor.load_state_dict(self.average.state_dict())

    # --- acting --------------------------------------------------------------------------------

    def choose(self, observation: Tensor, generator: torch.Generator, *, explore: bool) -> Tensor:
        """Return the critics' favourite among chains of the average.

        Exploring, the chains have noise, and a candidate's score is the least of two members'
        drawn for it; else the flow is solved, or the diffusion sampled as it is, and all members
        are asked.
        """
        number = self.variant.best_of
        candidates = self.propose(observation, number, generator, explore=explore)
        if number == 1:
            return candidates[0]
        values = self.averaged(observation, candidates)
        if not explore:
            return best_of(candidates, values.mean(0))
        draws = torch.rand(values.shape, generator=generator, device=values.device)
        pair = draws.topk(min(2, len(values)), dim=0).indices
        return best_of(candidates, values.gather(0, pair).amin(0))

    def propose(
        self, observation: Tensor, number: int, generator: torch.Generator, *, explore: bool = True
    ) -> Tensor:
        """Return ``number`` chunks of the average for each state, ``[number, B, H, A]``."""
        leading = (number, len(observation))
        noise, step_noise = self.chain.draw(leading, generator)
        if explore:
            return self.ends(self.chain.sample(self.average, observation, noise, step_noise))
        # Of a diffusion model whose own steps have noise, these are that noise.
        draws = noise.view(*leading, -1, self.specs.action_dim)
        if self.average.num_draws > 1:
            draws = torch.cat((draws, step_noise.view(*leading, -1, self.specs.action_dim)), dim=-2)
        return sample_chunks(self.average, observation, draws)

    def ends(self, states: Tensor) -> Tensor:
        """Return the clipped ends ``[..., H, A]`` of chains ``[..., K + 1, *action_shape]``."""
        last = -1 - len(self.chain.action_shape)
        end = states.select(last, -1).clamp(-1.0, 1.0)
        return as_chunk(end, self.settings.horizon)

    # --- learning ------------------------------------------------------------------------------

    def next_chunks(self, observation: Tensor) -> Tensor:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        return self.propose(observation, self.settings.target_samples, self.generator)

    def learn(self, anywhere: Windows, successful: Windows) -> dict[str, Tensor]:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        first = self.policy_turn(anywhere, successful) if self.variant.policy_first else {}
        metrics = self.update_critic(anywhere)
        if self.variant.success_critic and len(successful["reward"]) > 0:
            self.update_critic(successful)
        if not self.variant.policy_first:
            metrics |= self.policy_turn(anywhere, successful)
        return first | metrics

    def update_policy(self, batch: Windows, successful: Windows) -> dict[str, Tensor]:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        settings, generator = self.settings, self.generator
        observation = self.encode(batch["observation"][: settings.policy_batch_size])
        noise = self.chain.draw((settings.group_size, len(observation)), generator)
        states, old, advantage, metrics = self._sample_group(observation, *noise)
        imitated = successful if self._imitates(successful) else None
        if imitated is None and self.variant.imitate_anything and self.variant.bc_weight > 0:
            imitated = batch
        rows = 0 if imitated is None else len(imitated["observation"])
        draws = draw_imitation(self.actor, rows, self.specs.action_dim, generator) if rows else {}
        loss, more = self._policy_loss(observation, states, old, advantage, imitated, draws)
        optimizer = self._optimizers["policy"]
        optimizer.learning_rate = self.learning_rate(self._policy_updates)
        more |= optimizer.step(loss)
        follow(self.average, self.actor, settings.policy_polyak)
        self._policy_updates += 1
        wins = torch.tensor(float(len(successful["observation"]) > 0))
        return metrics | more | {"policy/successes": wins}

    def _imitates(self, successful: Windows) -> bool:
        return self.variant.bc_weight > 0 and len(successful["observation"]) > 0

    @torch.no_grad()
    def sample_group(
        self, observation: Tensor, noise: Tensor, step_noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Draw a group of chains for each state.

        Args:
            observation: ``[B, d]``.
            noise: ``[G, B, *action_shape]``.
            step_noise: ``[G, B, K, *action_shape]``.

        Returns:
            The chains ``[G, B, K + 1, *action_shape]``; under the average that they are drawn from
            their log-densities ``[G, B]``, divided as the settings say; their advantages
            ``[G, B]``; and metrics.
        """
        states = self.chain.sample(self.average, observation, noise, step_noise)
        old = self.log_prob(self.average, observation, states)
        chunks = self.ends(states)
        values = self.averaged(observation, chunks).transpose(0, 1)
        advantage = group_advantage(values, how=self.variant.advantage)
        metrics = {
            "policy/nonzero_advantages": (advantage != 0).float().mean(),
            "policy/group_std": values.mean(1).std(0).mean(),
            "policy/saturated": (chunks.abs() >= 1.0).float().mean(),
        }
        return states, old, advantage, metrics

    def log_prob(
        self, policy: FlowPolicy | DiffusionPolicy, observation: Tensor, states: Tensor
    ) -> Tensor:
        """Return the log-densities of chains ``[G, B]``, divided as the settings say."""
        steps = self.settings.last_steps
        density = self.chain.log_prob(policy, observation, states, last_steps=steps)
        return density / self._normalizer

    def policy_loss(
        self,
        observation: Tensor,
        states: Tensor,
        old: Tensor,
        advantage: Tensor,
        imitated: Windows | None,
        draws: Draws,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return PPO's loss on chains, with imitation, and metrics.

        Args:
            observation: ``[B, d]``.
            states: Of :meth:`sample_group`.
            old: Of :meth:`sample_group`.
            advantage: Of :meth:`sample_group`.
            imitated: Windows to imitate, if any.
            draws: Random numbers of the imitation.
        """
        clip = self.settings.clip
        log_ratio = clamped_log_ratio(self.log_prob(self.actor, observation, states), old)
        loss = ppo_clip(log_ratio, advantage, clip_low=clip, clip_high=clip).mean()
        ratio = log_ratio.detach().exp()
        metrics = {
            "loss/policy": loss.detach(),
            "policy/ratio": ratio.mean(),
            "policy/ratio_min": ratio.amin(),
            "policy/ratio_max": ratio.amax(),
            "policy/clipped_high": ((ratio > 1 + clip) & (advantage > 0)).float().mean(),
            "policy/clipped_low": ((ratio < 1 - clip) & (advantage < 0)).float().mean(),
        }
        if imitated is not None:
            seen = self.encode(imitated["observation"])
            imitation, more = imitation_loss(
                self.actor, seen, imitated["action"], imitated["valid"], draws
            )
            loss, metrics = loss + self.variant.bc_weight * imitation, metrics | more
        return loss, metrics

    def learning_rate(self, updates: int) -> float:
        """Return the policy's step size after so many updates: linear, then half a cosine."""
        settings = self.settings
        if updates < settings.warmup_updates:
            return settings.learning_rate * (updates + 1) / settings.warmup_updates
        share = (updates - settings.warmup_updates) / settings.decay_updates
        return half_cosine(settings.learning_rate, settings.final_learning_rate, share)

    def training_state(self) -> dict[str, Any]:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        return super().training_state() | {"policy_updates": self._policy_updates}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """See :class:`~genpol.finetuning.FinetuningAgent`."""
        super().load_training_state(state)
        self._policy_updates = state["policy_updates"]


AGENT = OGPO
