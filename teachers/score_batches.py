"""What a teacher scores at once, and which rank does it.

Batches are cut from all samples of a teacher, whoever scores them and whatever is stored already, so states
are the same bits on any number of ranks and after any kill. Ranks take neighbouring batches of about equal
work: of N teachers and R ranks there are at most N + R - 1 loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence


def cut_batches(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Keys in order, cut so that a batch has at most `most` tokens (one sample may have more).

    sizes  key of a sample -> its tokens
    """
    batch: list[str] = []
    total = 0
    for key, size in sizes.items():
        if batch and total + size > most:
            yield batch
            batch, total = [], 0
        batch.append(key)
        total += size
    if batch:
        yield batch


def share_out(sizes: Sequence[int], num_ranks: int) -> list[int]:
    """The rank of each batch, in runs: that in whose part of all tokens the middle of the batch lies.

    Example: sizes 4 4 4 4, 2 ranks → 0 0 1 1; sizes 1 8 1, 2 ranks → 0 1 1.
    """
    total, before, ranks = max(1, sum(sizes)), 0, []
    for size in sizes:
        ranks.append(min((2 * before + size) * num_ranks // (2 * total), num_ranks - 1))
        before += size
    return ranks
