"""A vocabulary whose rows lie on several ranks, each with one contiguous part of every prediction head.

Shapes: R ranks, c tokens, V rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Vocabulary:
    """Rows [start, start + num_rows) of `size` lie here; `group` holds the ranks, None for a whole one.

    Ranks hold their parts in the order of their ranks in the group.
    """

    size: int
    start: int
    num_rows: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def whole(cls, size: int) -> Vocabulary:
        """All rows here."""
        return cls(size, 0, size)

    @classmethod
    def shard(cls, size: int, group: dist.ProcessGroup | None = None) -> Vocabulary:
        """This rank's part of an even split over the group (the default group if None); the first
        size mod R ranks have one row more."""
        group = dist.group.WORLD if group is None else group
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        each, more = divmod(size, ranks)
        return cls(size, rank * each + min(rank, more), each + (rank < more), group)

    @property
    def is_split(self) -> bool:
        return self.group is not None

    def check(self, head: Tensor) -> None:
        """ValueError unless the head [V, D] has this rank's rows."""
        if head.shape[0] != self.num_rows:
            held = f"rows {self.start} to {self.start + self.num_rows} of {self.size}"
            raise ValueError(
                f"head has {head.shape[0]} rows, this rank's vocabulary {self.num_rows} ({held})"
            )

    def local(self, target_ids: Tensor) -> Tensor:
        """[c] row in this rank's part of each target, −1 for those of other ranks."""
        if not self.is_split:
            return target_ids
        row = target_ids - self.start
        return torch.where((row >= 0) & (row < self.num_rows), row, -1)

    def gathered(self, x: Tensor) -> Tensor:
        """[R, …] the x of every rank, in the order of ranks."""
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.stack(parts)

    def summed(self, x: Tensor) -> Tensor:
        """x summed over the ranks, in place; x itself where the vocabulary is whole."""
        if self.is_split:
            dist.all_reduce(x, group=self.group)
        return x
