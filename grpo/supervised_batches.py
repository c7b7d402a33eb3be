"""Which examples a step of supervised training sees: a function of seed and step alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from consilience.conf.errors import ConfigError
from consilience.training.packing import PackedRows, pack


@dataclass(frozen=True)
class Example:
    """One encoded conversation: token ids and loss weights (0 = no loss) of equal length."""

    token_ids: Sequence[int]
    loss_weight: Sequence[float]


class SupervisedBatches:
    """The packed rows of every step; each step takes each group's share of its tokens.

    shares  relative share of each group; empty: equal shares
    ConfigError: a group with a share has no examples.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Example]],
        *,
        tokens_per_step: int,
        row_tokens: int,
        shares: Sequence[float] = (),
        seed: int = 0,
    ) -> None:
        weights = shares or (1.0,) * len(groups)
        self._tokens = [tokens_per_step * weight / sum(weights) for weight in weights]
        for number, (group, share) in enumerate(zip(groups, self._tokens)):
            if share > 0 and not group:
                raise ConfigError(
                    f"supervised training: group {number} of {len(groups)} has no examples; "
                    "raise num_examples to at least episodes, or set the group's share to 0"
                )
        self._groups, self._row_tokens, self._seed = groups, row_tokens, seed
        self._rewind()

    def at(self, step: int) -> PackedRows:
        """The rows of a step. Going on is cheap; going back to a forgotten step draws from the start."""
        if step < self._next and step not in self._drawn:
            self._rewind()
        while self._next <= step:
            self._drawn[self._next] = self._draw()
            self._next += 1
        chosen = self._drawn[step]
        return pack(
            [e.token_ids for e in chosen],
            [e.loss_weight for e in chosen],
            quantum=32,
            max_row_tokens=self._row_tokens,
        )

    def forget(self, step: int) -> None:
        """Steps before this one will not be asked for again soon."""
        self._drawn = {s: chosen for s, chosen in self._drawn.items() if s >= step}

    def _rewind(self) -> None:
        self._streams = [_Stream(group, self._seed + index) for index, group in enumerate(self._groups)]
        self._drawn: dict[int, list[Example]] = {}
        self._next = 0

    def _draw(self) -> list[Example]:
        chosen = [e for stream, share in zip(self._streams, self._tokens) for e in stream.take(share)]
        # Where the examples before were longer than their steps, this step's share is already spent.
        return chosen or [self._streams[self._tokens.index(max(self._tokens))].next()]


class _Stream:
    """Examples in a seeded order, reshuffled every epoch."""

    def __init__(self, examples: Sequence[Example], seed: int) -> None:
        self._examples = examples
        self._rng = np.random.default_rng(seed)
        self._order: Iterator[int] = iter(())
        self._surplus = 0.0

    def take(self, num_tokens: float) -> list[Example]:
        """The next examples, until all taken so far hold at least `num_tokens` for each call.

        What one call takes too much the next takes less, so that shares hold on average.
        """
        chosen: list[Example] = []
        held = self._surplus
        while held < num_tokens:
            chosen.append(self.next())
            held += len(chosen[-1].token_ids)
        self._surplus = held - num_tokens
        return chosen

    def next(self) -> Example:
        """The next example, whatever its length. There must be at least one."""
        index = next(self._order, None)
        if index is None:
            self._order = iter(self._rng.permutation(len(self._examples)).tolist())
            index = next(self._order)
        return self._examples[index]
