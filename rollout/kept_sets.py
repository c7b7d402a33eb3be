"""Which tokens a truncated sampler could have drawn: the support that a trainer renormalises over.

Top-k, top-p and min-p cut the distribution by the sampler's own probabilities; cutting the trainer's by the
same rule gives another set, and a ratio of 0 or a biased one (post-training notes 2.3, "Keep Sampling Mask").
So the set is recorded: 4 (1 + its size) bytes a token; 4/3 of it in JSON. A size of 0 is a token without a
record: not sampled, not truncated, or taken over from a dead worker's log, which has no sets.

N tokens of a turn or an episode.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from consilience.rollout.columns import Column, bytes_from, bytes_of, plain_bytes


@dataclass(frozen=True, slots=True)
class KeptSets:
    """sizes: N numbers, uint32; ids: the sets' token ids end to end, ascending in each, uint32.

    Either may lie on disk; whether they agree is checked where they do not.
    """

    sizes: bytes | Column
    ids: bytes | Column

    def __post_init__(self) -> None:
        if not isinstance(self.sizes, Column) and int(self.num_ids().sum()) * 4 != len(self.ids):
            raise ValueError(
                f"kept sets of {self.num_ids().sum()} ids in all with {len(self.ids)} bytes of ids"
            )

    @classmethod
    def of(cls, sets: Sequence[np.ndarray | None]) -> KeptSets:
        """From one array of ids a token; None: no record."""
        found = [np.empty(0, "<u4") if one is None else one.astype("<u4") for one in sets]
        sizes = np.array([len(one) for one in found], "<u4")
        return cls(sizes.tobytes(), b"".join(one.tobytes() for one in found))

    @property
    def num_tokens(self) -> int:
        return len(self.sizes) // 4

    def num_ids(self) -> np.ndarray:
        """[N] size of each token's set; 0: no record."""
        return np.frombuffer(bytes_of(self.sizes), "<u4").astype(np.int64)

    def token_ids(self) -> np.ndarray:
        """The ids of all sets, end to end."""
        return np.frombuffer(bytes_of(self.ids), "<u4").astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        return {name: plain_bytes(getattr(self, name)) for name in ("sizes", "ids")}

    @classmethod
    def from_json(cls, row: dict[str, Any], root: Path | None = None) -> KeptSets:
        """Inverse of `to_json`; references are to files under `root`."""
        return cls(*(bytes_from(row[name], root) for name in ("sizes", "ids")))


def joined(num_tokens: int, pieces: Sequence[tuple[int, KeptSets]]) -> KeptSets | None:
    """Those of an episode of `num_tokens` from pieces (number of its first token, sets), ascending.

    Tokens between them have no record. None without pieces.
    """
    if not pieces:
        return None
    sizes = np.zeros(num_tokens, "<u4")
    for first, piece in pieces:
        sizes[first : first + piece.num_tokens] = piece.num_ids()
    return KeptSets(sizes.tobytes(), b"".join(bytes_of(piece.ids) for _, piece in pieces))
