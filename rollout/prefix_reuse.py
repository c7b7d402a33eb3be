"""What an engine takes from a prefix store instead of computing it, and what it leaves there.

A prefix is known by the key of its last block (`prefix_keys.py`). `<key>.block` holds a block's compressed
entries, `<key>.rest` what else a sequence needs to go on there. How many rests there are is the window policy
(report 3.5): "whole", at every block; "checkpointed", every so many tokens, and a prefix is taken up to the
last of them; "recomputed", none: the newest tokens are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from consilience.conf.errors import ConfigError
from consilience.model.prefix_state import block_of, recompute_window, rest_of, restore, window_reach
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer
from consilience.rollout.prefix_keys import PrefixKeys
from consilience.rollout.prefix_store import PrefixStore

WINDOWS = ("whole", "checkpointed", "recomputed")


@dataclass(frozen=True, slots=True)
class PrefixCaching:
    """Where prefixes are kept and how much of each.

    window         "whole", "checkpointed" or "recomputed"
    period_tokens  between two windows of "checkpointed"; whole blocks (128 tokens at the released ratios)
    limit_bytes    of the folder, all processes together
    """

    folder: Path
    window: str = "whole"
    period_tokens: int = 2048
    limit_bytes: int = 16 << 30


class PrefixReuse:
    """The store as one engine's decode state sees it.

    num_hits, num_misses  prompts of a block or more, found at least in part, or not
    num_tokens            tokens that did not have to be computed
    ConfigError: a policy or a period that is none, or the state of an engine that drafts.
    """

    def __init__(
        self, model: Transformer, state: object, caching: PrefixCaching, keys: PrefixKeys, most_tokens: int
    ) -> None:
        if not isinstance(state, DecodeState):
            raise ConfigError(
                "prefixes on disk hold no state of the MTP block; set rollout.speculative=false, or "
                "rollout.prefix_store.path=null"
            )
        self.block = model.config.block_tokens
        if caching.window not in WINDOWS:
            raise ConfigError(f"prefix store: window is {caching.window!r}; allowed: {', '.join(WINDOWS)}")
        period = self.block if caching.window == "whole" else caching.period_tokens
        if caching.window == "checkpointed" and (period % self.block or not period):
            raise ConfigError(
                f"prefix store: a window every {period} tokens; blocks have {self.block}, so "
                f"a multiple of {self.block} is needed"
            )
        self.model, self.state, self.window = model, state, caching.window
        self.store = PrefixStore(caching.folder, caching.limit_bytes)
        self.num_hits = self.num_misses = self.num_tokens = 0
        self._period = period
        self._reach = window_reach(model.config)
        self._keys, self._most_tokens = keys, most_tokens

    def counts(self) -> dict[str, int]:
        """What an `EngineState` says of it."""
        return {
            "prefix_hits": self.num_hits,
            "prefix_misses": self.num_misses,
            "prefix_tokens": self.num_tokens,
            "prefix_corrupted": self.store.num_corrupted,
        }

    # ---- prefill --------------------------------------------------------------------------------

    def advance(
        self,
        first: int,
        streams: Sequence[tuple[int, ...]],
        leave: int,
        feed: Callable[[int, list[tuple[int, ...]]], object],
    ) -> int:
        """Bring rows first.. towards their `streams`, of which they have consumed what their positions say.

        What the store has is taken from it; `feed(first, tokens a row)` computes the rest up to the last
        border that the policy keeps, and that is stored. At least `leave` tokens of each stream are left for
        the caller; with 0 the streams are continuations, of which nothing is stored. Returns the tokens
        computed again for their windows.
        """
        keys = [self._keys.of_blocks(ids[: len(ids) - leave]) for ids in streams]
        again = sum(self._take(first + n, ids[: len(ids) - leave], keys[n]) for n, ids in enumerate(streams))
        while leave:
            at = self.state.position[first : first + len(streams)].tolist()
            stops = [self._next_border(a, len(ids) - leave) for a, ids in zip(at, streams)]
            if stops == at:
                break
            feed(first, [ids[a:b] for ids, a, b in zip(streams, at, stops)])
            for n, (a, b) in enumerate(zip(at, stops)):
                if b > a:
                    self._keep(first + n, keys[n], b)
        return again

    def _next_border(self, at: int, most: int) -> int:
        """Where to stop and store next, on the way from `at` to `most` tokens; `at` where no stop comes."""
        last = most // self.block * self.block
        border = last if self.window == "recomputed" else (at // self._period + 1) * self._period
        return border if at < border <= most else at

    def _keep(self, row: int, keys: Sequence[str], length: int) -> None:
        """Store the blocks of `row` up to a border, and there its rest, if the policy keeps it."""
        passed = keys[: length // self.block]
        names = [f"{key}.block" for key in passed]
        for number, name in enumerate(names):
            if not self.store.has(name):
                self.store.write(name, block_of(self.state, row, number))
        if self.window != "recomputed":
            names.append(f"{passed[-1]}.rest")
            if not self.store.has(names[-1]):
                self.store.write(names[-1], rest_of(self.state, row))
        self.store.touch(names)

    def _take(self, row: int, ids: tuple[int, ...], keys: list[str]) -> int:
        """Restore as much of `ids` into `row` as saves most; the tokens computed again for it."""
        at = int(self.state.position[row])
        for _ in range(3):  # an entry may be damaged, or leave while others are read
            held = next((n for n, key in enumerate(keys) if not self.store.has(f"{key}.block")), len(keys))
            best = max(self._ways(keys[:held]), key=lambda way: way[0] - way[2], default=(0, "", 0))
            length, rest_name, cost = best
            if length - cost <= at:
                break
            names = [f"{key}.block" for key in keys[: length // self.block]]
            names += [rest_name] if rest_name else []
            found = [self.store.read(name) for name in names]
            tensors = [entry for entry in found if entry is not None]
            if len(tensors) < len(names):
                continue
            self.store.touch(names)
            blocks, rest = (tensors[:-1], tensors[-1]) if rest_name else (tensors, None)
            restore(self.state, row, length, blocks, rest)
            if not rest_name:
                recompute_window(self.model, self.state, row, ids[:length], self._most_tokens)
            self.num_hits += 1
            self.num_tokens += length - cost - at
            return cost
        self.num_misses += bool(keys)
        return 0

    def _ways(self, keys: list[str]) -> Iterator[tuple[int, str, int]]:
        """(length, name of its rest or "", tokens to compute again) of prefixes with all their blocks."""
        for number in range(len(keys), 0, -1):
            if self.store.has(f"{keys[number - 1]}.rest"):
                yield number * self.block, f"{keys[number - 1]}.rest", 0
                break
        if self.window == "recomputed" and keys:
            border = len(keys) * self.block
            yield border, "", min(self._reach, border)
