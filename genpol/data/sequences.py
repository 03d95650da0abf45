"""What was collected, in the order it came, so that windows can be drawn from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from genpol.data.goals import draw_goals, relabel
from genpol.data.windows import WindowSampler, WindowSpec, discounted
from genpol.errors import ConfigError

_KEYS = ("observation", "action")
_AFTER = ("observation", "reward", "terminated", "done", "diverged")


class SequenceReplay:
    """The last steps of some environments, and windows over them and over a data set beside.

    Windows are drawn uniformly over both together: offline data are one part of the buffer, as in
    QC and FQL, and their share shrinks as more is collected. Batches are those of
    :class:`~genpol.data.windows.WindowSampler`, on the CPU; a window ends with its episode. Steps
    whose physics diverged are not valid.

    Windows with goals begin where more than H steps of their episode are held. Future goals are
    what it achieved later on (``achieved_goal``), random ones come from everywhere.

    With ``successes`` it knows which collected steps belong to an episode that ended with success:
    the success buffer of OGPO, which are the same rows. Behind the windows from anywhere, a batch
    then has so many of those, once there are that many, and ``successful`` bool ``[B]`` tells them.

    Args:
        spec: The windows.
        capacity: Transitions held; older ones are overwritten.
        num_envs: Environments that are stepped together.
        seed: Seed of the draws.
        offline: What else to draw from; windows with goals need it.
        offline_share: Share of each batch that comes from the data set; by default each window,
            wherever it is, is equally likely.
        successes: Windows of successful episodes in each batch; 0 needs no ``success`` to be told.

    Raises:
        ConfigError: If the windows do not fit in, or goals and successes are both asked for.
    """

    def __init__(
        self,
        spec: WindowSpec,
        *,
        capacity: int,
        num_envs: int,
        seed: int,
        offline: WindowSampler | None = None,
        successes: int = 0,
        offline_share: float | None = None,
    ) -> None:
        self.spec = spec
        self._times = capacity // num_envs
        if self._times < spec.steps:
            raise ConfigError(
                f"agent.replay_capacity = {capacity}: must hold {spec.steps} steps of {num_envs} "
                "environments"
            )
        if successes > 0 and spec.goals is not None:
            raise ConfigError("windows with goals know no successes: set one of the two aside")
        self._num_envs = num_envs
        self._offline = offline
        self._offline_share = offline_share
        self._num_offline = 0 if offline is None else offline.num_starts
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = _KEYS + ("achieved_goal",) * (spec.goals is not None)
        self._successes = successes
        self._after = _AFTER + ("success",) * (successes > 0)
        self._rows: dict[str, Tensor] = {}
        self._written = 0
        # The number of the last step of each held step's episode; -1 while that goes on.
        self._ends = torch.full((self._times, num_envs), -1)
        self._begins = torch.zeros(num_envs, dtype=torch.int64)  # of the episodes that go on
        self._cuts: list[tuple[int, int]] = []  # steps and environments whose episode was cut
        # Of each held step, whether its episode ended with success.
        self._won = torch.zeros(self._times, num_envs, dtype=torch.bool) if successes else None
        self._won_starts: Tensor | None = None

    def __len__(self) -> int:
        """Return how many collected transitions it holds."""
        return self._held * self._num_envs

    @property
    def _held(self) -> int:
        return min(self._written, self._times)

    @property
    def num_starts(self) -> int:
        """Collected steps with H steps of the same environment from there on."""
        return max(0, self._held - self.spec.steps + 1) * self._num_envs

    def extend(self, rollout: TensorDict) -> None:
        """Add a rollout ``[num_envs, time]`` that goes on where the last one ended.

        Where its first step begins an episode, the one before was cut, as by a resumption.
        """
        new = {name: rollout[name].cpu() for name in self._keys}
        new |= {f"next_{name}": rollout["next", name].cpu() for name in self._after}
        steps = rollout.shape[1]
        if not self._rows:
            self._rows = {
                name: x.new_zeros((self._times, self._num_envs, *x.shape[2:]))
                for name, x in new.items()
            }
        elif self._written:
            last = self._written - 1
            going_on = ~self._rows["next_done"][last % self._times].squeeze(-1)
            cut = going_on & rollout["is_init"][:, 0].squeeze(-1).cpu()
            self._cuts += [(last, env) for env in cut.nonzero().squeeze(-1).tolist()]
            self._rows["next_done"][last % self._times] |= cut.unsqueeze(-1)
            self._note_ends(last, 1)
        skipped = max(0, steps - self._times)
        at = torch.arange(self._written + skipped, self._written + steps) % self._times
        for name, x in new.items():
            self._rows[name][at] = x.transpose(0, 1)[skipped:]
        self._ends[at] = -1
        if self._won is not None:
            self._won[at] = False
        self._won_starts = None
        self._written += steps
        self._note_ends(self._written - len(at), len(at))

    def _note_ends(self, first: int, number: int) -> None:
        """Write down where the episodes end that end within these steps."""
        at = torch.arange(first, first + number) % self._times
        for step, env in self._rows["next_done"][at].squeeze(-1).nonzero().tolist():
            end = first + step
            begin = max(int(self._begins[env]), end + 1 - self._times)
            own = torch.arange(begin, end + 1) % self._times
            self._ends[own, env] = end
            self._begins[env] = end + 1
            if self._won is not None:
                self._won[own, env] = bool(self._rows["next_success"][end % self._times, env])

    def sample(self, size: int) -> TensorDict:
        """Return windows ``[size]``, from the data set and from what was collected."""
        index = self._draw(size) if self._offline_share is None else self._draw_shares(size)
        # The data set's first: so do the parts stand in the batch.
        index = torch.cat((index[index < self._num_offline], index[index >= self._num_offline]))
        if self.spec.goals is not None:
            return self._with_goals(index, self._draw(size))
        batch = self._joined(index, None, None)
        return self._with_successes(batch) if self._successes > 0 else batch

    def _with_successes(self, batch: TensorDict) -> TensorDict:
        batch["successful"] = torch.zeros(len(batch), dtype=torch.bool)
        starts = self._successful()
        if len(starts) < self._successes:
            return batch
        chosen = torch.randint(len(starts), (self._successes,), generator=self._generator)
        windows = self._at(starts[chosen])
        windows["successful"] = torch.ones(len(windows), dtype=torch.bool)
        joined: TensorDict = torch.cat((batch, windows))
        return joined

    @property
    def num_successful(self) -> int:
        """Collected steps of episodes that ended with success at which a window can begin."""
        return len(self._successful())

    def _successful(self) -> Tensor:
        """Return the numbers of the windows that begin in episodes that ended with success."""
        if self._won is None:
            return torch.zeros(0, dtype=torch.int64)
        if self._won_starts is None:
            oldest = self._written - self._held
            steps = torch.arange(oldest, oldest + self.num_starts // self._num_envs) % self._times
            self._won_starts = self._num_offline + self._won[steps].flatten().nonzero().squeeze(-1)
        return self._won_starts

    def _draw_shares(self, size: int) -> Tensor:
        """Return numbers of windows, a fixed share of them of the data set."""
        assert self._offline_share is not None
        number = round(self._offline_share * size) if self.num_starts > 0 else size
        data = torch.randint(self._num_offline, (number,), generator=self._generator)
        own = torch.randint(max(1, self.num_starts), (size - number,), generator=self._generator)
        return torch.cat((data, self._num_offline + own))

    def _draw(self, size: int) -> Tensor:
        """Return numbers of windows; those of the data set come first."""
        number = self._num_offline + self.num_starts
        index = torch.randint(number, (size,), generator=self._generator)
        while self.spec.goals is not None:
            short = ~self._long_enough(index)
            if not short.any():
                break
            again = torch.randint(number, (int(short.sum()),), generator=self._generator)
            index[short] = again
        return index

    def _long_enough(self, index: Tensor) -> Tensor:
        """Return whether more than H steps of the episode are left where windows begin."""
        start, env = self._place(index.clamp_min(self._num_offline))
        return (index < self._num_offline) | (start + self.spec.steps <= self._end(start, env))

    def _place(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return step and environment where collected windows begin."""
        index = index - self._num_offline
        oldest = self._written - self._held
        return oldest + index // self._num_envs, index % self._num_envs

    def _end(self, start: Tensor, env: Tensor) -> Tensor:
        """Return the last step of each step's episode so far."""
        end = self._ends[start % self._times, env]
        return torch.where(end == -1, self._written - 1, end)

    def _with_goals(self, index: Tensor, anywhere: Tensor) -> TensorDict:
        """Return windows whose random goals are states of the given numbers, wherever they lie."""
        assert self._offline is not None
        split = self._num_offline
        start, env = self._place(anywhere.clamp_min(split))
        row, _ = self._offline.rows_of(anywhere.clamp_max(split - 1))
        collected = anywhere >= split
        own_env = self._place(index.clamp_min(split))[1]
        # As rows of a window's own trajectories, or -1.
        offline_rows = torch.where(collected, -1, row)
        steps = torch.where(collected & (env == own_env), start, -1)
        batch = self._joined(index, offline_rows, steps)
        elsewhere = batch.pop("elsewhere")
        achieved = self._offline.goal(row)
        if self._rows:
            there = self._rows["achieved_goal"][start % self._times, env]
            achieved = torch.where(collected[:, None], there, achieved)
        batch["goal"] = torch.where(elsewhere[:, None], achieved, batch["goal"])
        return batch

    def _joined(self, index: Tensor, rows: Tensor | None, steps: Tensor | None) -> TensorDict:
        """Return the windows of the data set, then the collected ones.

        Args:
            index: Their numbers.
            rows: Rows of the data set to take random goals from, ``[B]``.
            steps: Steps of a window's own environment to take them from, ``[B]``.
        """
        number = int((index < self._num_offline).sum())
        parts = []
        if self._offline is not None and number > 0:
            given = None if rows is None else rows[:number]
            parts.append(self._offline.at(index[:number], anywhere=given))
        if number < len(index):
            parts.append(self._at(index[number:], None if steps is None else steps[number:]))
        batch: TensorDict = torch.cat(parts) if len(parts) > 1 else parts[0]
        return batch

    def _at(self, index: Tensor, anywhere: Tensor | None = None) -> TensorDict:
        """Return the collected windows of the given numbers, ``[B]``."""
        start, env = self._place(index)
        window = (start[:, None] + torch.arange(self.spec.steps)) % self._times

        def rows(name: str) -> Tensor:
            return self._rows[name][window, env[:, None]]

        done, diverged = (rows(f"next_{name}").squeeze(-1) for name in ("done", "diverged"))
        ended = done.long().cumsum(1) - done.long()
        valid = (ended == 0) & ~diverged
        if anywhere is not None:
            earned, following = self._goals(start, env, anywhere)
        else:
            reward, terminated = (
                rows(f"next_{name}").squeeze(-1) for name in ("reward", "terminated")
            )
            wanted = self.spec.rewards
            earned = discounted(reward, terminated, valid, self.spec.gamma) if wanted else {}
            if self.spec.every_step:
                first = self._rows["observation"][window[:, :1], env[:, None]]
                earned["observations"] = torch.cat((first, rows("next_observation")), dim=1)
                earned |= {"rewards": reward, "terminated": terminated}
            last = (valid.sum(1) - 1).clamp_min(0)
            at_end = window[torch.arange(len(index)), last], env
            following = self._rows["next_observation"][at_end]
        fields = {
            "observation": self._rows["observation"][window[:, 0], env],
            "action": rows("action"),
            "valid": valid,
            "weight": valid[:, -1].float(),
            **earned,
            "next": TensorDict({"observation": following}, [len(index)]),
        }
        return TensorDict(fields, [len(index)])

    def _goals(
        self, start: Tensor, env: Tensor, anywhere: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return goals, what they make of rewards, and the observations to go on from."""
        spec = self.spec
        assert spec.goals is not None
        goals = draw_goals(start, self._end(start, env), anywhere, spec.goals, self._generator)
        reward, discount, steps = relabel(
            start, goals, steps=spec.steps, gamma=spec.gamma, rule=spec.goals.rule
        )
        earned = {
            "reward": reward,
            "discount": discount,
            "goal": self._rows["achieved_goal"][goals.clamp_min(0) % self._times, env],
            "elsewhere": goals < 0,
        }
        return earned, self._rows["observation"][(start + steps) % self._times, env]

    @property
    def span(self) -> tuple[int, int]:
        """The numbers of the oldest step held and of the next one to come."""
        return self._written - self._held, self._written

    def rows(self, first: int, last: int) -> dict[str, Tensor]:
        """Return held steps by their numbers, ``[last - first, num_envs, ...]`` each."""
        at = torch.arange(first, last) % self._times
        return {name: x[at] for name, x in self._rows.items()}

    def position(self) -> dict[str, Any]:
        """Return all but the steps themselves, and what follows from them."""
        held = self._written - self._held
        return {
            "written": self._written,
            "cuts": [list(cut) for cut in self._cuts if cut[0] >= held],
            "generator": self._generator.get_state(),
        }

    def restore(self, rows: Mapping[str, Tensor], position: Mapping[str, Any]) -> None:
        """Become what :meth:`rows` of the whole :attr:`span` and :meth:`position` say."""
        self._written = position["written"]
        self._generator.set_state(position["generator"])
        self._cuts = [(step, env) for step, env in position["cuts"]]
        first, last = self.span
        at = torch.arange(first, last) % self._times
        self._rows = {}
        for name, x in rows.items():
            self._rows[name] = x.new_zeros((self._times, *x.shape[1:]))
            self._rows[name][at] = x
        for step, env in self._cuts:
            self._rows["next_done"][step % self._times, env] = True
        self._ends.fill_(-1)
        self._begins.fill_(first)
        if self._won is not None:
            self._won.fill_(False)
        self._won_starts = None
        if self._rows:
            self._note_ends(first, last - first)
