"""Samples of different lengths into full rows: plain arrays in, plain arrays out.

Contract: docs/architecture.md, "Training data". Legend: S samples, n tokens of one sample,
B rows, T tokens in a row.

Worked example, one row of T = 8 with quantum 8:

    sample 0   token_ids 5 6 7     loss_mask 0 1 1
    sample 1   token_ids 8 9       loss_mask 0 1

    token_ids     5  6  7  8  9  0  0  0
    segment_ids   0  0  0  1  1 -1 -1 -1
    position_ids  0  1  2  0  1  0  0  0
    target_ids    6  7  0  9  0  0  0  0
    loss_mask     1  1  0  1  0  0  0  0

Everything that belongs to a *token* (its mask, weight, log-prob, advantage) lands on the position
that *predicts* it, one to the left. The first token of a sample has no such position: its mask and
arrays are left out. Packing is first-fit decreasing and a pure function of its input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import Any

import numpy as np

from consilience.conf.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows ready for the model, and the way back to the samples.

    token_ids     [B, T] int64, 0 in padding
    segment_ids   [B, T] int32, -1 in padding, counted from 0 in each row
    position_ids  [B, T] int64, from 0 in each sample
    target_ids    [B, T] int64, token t + 1 of the same sample; 0 where there is none
    loss_mask     [B, T] float32, weight of predicting the target; 0 where there is none
    sample_index  [B, T] int32, index of the sample in the input, -1 in padding
    arrays        name -> [B, T] float32, value that belongs to the target; 0 where there is none
    rows, starts, lengths   [S] int64: sample s fills rows[s], starts[s] … starts[s] + lengths[s] - 1
                  (the inverse map; rows count from the first row of the whole packing)
    """

    token_ids: np.ndarray
    segment_ids: np.ndarray
    position_ids: np.ndarray
    target_ids: np.ndarray
    loss_mask: np.ndarray
    sample_index: np.ndarray
    arrays: dict[str, np.ndarray]
    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int((self.segment_ids >= 0).sum())

    @property
    def num_loss_tokens(self) -> int:
        """Positions with a loss: what a mean over tokens divides by (weights not counted)."""
        return int((self.loss_mask > 0).sum())

    @property
    def loss_weight(self) -> float:
        """Sum of the loss weights, in fp64."""
        return float(self.loss_mask.sum(dtype=np.float64))

    def to_torch(self, device: Any = None) -> dict[str, Any]:
        """The [B, T] arrays as torch tensors by name; those of `arrays` under their own names."""
        import torch

        fields = ("token_ids", "segment_ids", "position_ids", "target_ids", "loss_mask", "sample_index")
        named = {name: getattr(self, name) for name in fields} | self.arrays
        return {
            name: torch.from_numpy(np.ascontiguousarray(value)).to(device) for name, value in named.items()
        }


def pack(
    token_ids: Sequence[Sequence[int] | np.ndarray],
    loss_mask: Sequence[Sequence[float] | np.ndarray] | None = None,
    arrays: Mapping[str, Sequence[Sequence[float] | np.ndarray]] | None = None,
    *,
    quantum: int = 64,
    max_row_tokens: int = 1024,
) -> PackedRows:
    """Pack S samples into B rows of T tokens, T a multiple of `quantum` and at most `max_row_tokens`.

    token_ids  S sequences of n ints;  loss_mask  S sequences of n weights >= 0 (None: all 1);
    arrays     name -> S sequences of n floats. NaN means "no value" and is allowed only where the
               loss mask is 0 (a missing log-prob is dropped from mask and denominator by the caller,
               never filled in here).
    ConfigError: a sample longer than a row. ValueError: arrays that do not line up.
    """
    arrays = dict(arrays or {})
    clash = sorted(set(arrays) & set(PackedRows.__dataclass_fields__))
    if clash:
        raise ValueError(f"array names {clash} are fields of the packed rows; choose others")
    lengths = np.fromiter(map(len, token_ids), np.int64, len(token_ids))
    row_tokens = _check(lengths, quantum, max_row_tokens)
    rows, starts, row_tokens, num_rows = _place(lengths, quantum, row_tokens)

    within = _ranges(lengths)
    sample = np.repeat(np.arange(len(lengths)), lengths)
    place = np.repeat(rows * row_tokens + starts, lengths) + within
    has_predictor = within > 0
    target_place = place[has_predictor] - 1
    shape = (num_rows, row_tokens)

    flat_tokens = _flatten(token_ids, lengths, np.int64, "token_ids")
    flat_mask = np.ones(len(flat_tokens), np.float32)
    if loss_mask is not None:
        flat_mask = _flatten(loss_mask, lengths, np.float32, "loss_mask")
        if not (np.isfinite(flat_mask).all() and (flat_mask >= 0).all()):
            raise ValueError("loss_mask holds a negative or non-finite weight; weights are 0 or more")
    order_in_row = _order_in_row(rows, starts)
    return PackedRows(
        token_ids=_scatter(shape, np.int64, 0, place, flat_tokens),
        segment_ids=_scatter(shape, np.int32, -1, place, order_in_row[sample]),
        position_ids=_scatter(shape, np.int64, 0, place, within),
        target_ids=_scatter(shape, np.int64, 0, target_place, flat_tokens[has_predictor]),
        loss_mask=_scatter(shape, np.float32, 0, target_place, flat_mask[has_predictor]),
        sample_index=_scatter(shape, np.int32, -1, place, sample),
        arrays={
            name: _scatter(
                shape,
                np.float32,
                0,
                target_place,
                _values(name, value, lengths, flat_mask, sample)[has_predictor],
            )
            for name, value in arrays.items()
        },
        rows=rows,
        starts=starts,
        lengths=lengths,
    )


def pack_episodes(
    prompts: Sequence[Sequence[int]],
    episodes: Sequence[Sequence[int]],
    loss_mask: Sequence[Sequence[float] | np.ndarray],
    row_tokens: int,
    arrays: Mapping[str, Sequence[Sequence[float]]] | None = None,
) -> PackedRows:
    """S prompts, each with what was sampled after it, as one sample each; a prompt bears no loss.

    prompts     S sequences of ids;  episodes, loss_mask, each of arrays  S sequences, one value a token
                of the episode (`pack` says of what kind)
    row_tokens  width of a row, unless a longer sample widens it
    """
    both = lambda prompt, own, dtype: np.concatenate([np.asarray(prompt, dtype), np.asarray(own, dtype)])
    samples = [both(prompt, episode, np.int64) for prompt, episode in zip(prompts, episodes)]
    before = [np.zeros(len(prompt)) for prompt in prompts]
    behind = lambda values: [both(zeros, own, np.float32) for zeros, own in zip(before, values)]
    return pack(
        samples,
        behind(loss_mask),
        {name: behind(values) for name, values in (arrays or {}).items()},
        quantum=32,
        max_row_tokens=row_length(max(map(len, samples), default=0), row_tokens),
    )


def row_length(longest: int, at_least: int = 1, quantum: int = 32) -> int:
    """Tokens of a row that holds a sample of `longest`: a multiple of `quantum`, at least `at_least`."""
    return -(-max(longest, at_least, 1) // quantum) * quantum


def split_micro_batches(packed: PackedRows, budget_tokens: int, num_ranks: int = 1) -> list[PackedRows]:
    """Consecutive row slices of at most `budget_tokens` positions each (padding counted: it costs too).

    num_ranks  ranks that share them: their number is a multiple of it as far as there are rows

    The inverse map of every slice is that of the whole packing, so results of the micro-batches,
    concatenated along rows in order, go through `unpack_*` of the whole. ConfigError when one row
    is already over the budget.
    """
    num_rows, row_tokens = packed.token_ids.shape
    if budget_tokens < row_tokens:
        raise ConfigError(
            f"a micro-batch of {budget_tokens} tokens cannot hold one row of {row_tokens}; "
            f"raise the micro-batch budget to at least {row_tokens} or shorten the rows"
        )
    num_parts = -(-num_rows // (budget_tokens // row_tokens))
    num_parts = min(num_rows, -(-num_parts // num_ranks) * num_ranks)
    edges = np.linspace(0, num_rows, num_parts + 1).round().astype(int)  # near-equal parts
    return [_slice_rows(packed, slice(lo, hi)) for lo, hi in pairwise(edges)]


def unpack_positions(packed: PackedRows, values: np.ndarray) -> list[np.ndarray]:
    """values [B, T, …] at positions -> S arrays [n, …], entry t from position t of the sample."""
    _check_rows(packed, values)
    spans = zip(packed.rows.tolist(), packed.starts.tolist(), packed.lengths.tolist())
    return [values[row, start : start + length] for row, start, length in spans]


def unpack_targets(packed: PackedRows, values: np.ndarray, missing: float = np.nan) -> list[np.ndarray]:
    """values [B, T] at predicting positions -> S arrays [n], entry t belongs to token t.

    The inverse of how `arrays` were laid out. Token 0 was never predicted: it gets `missing`.
    """
    found = []
    for at_positions in unpack_positions(packed, values):
        dtype = np.result_type(values.dtype, np.min_scalar_type(missing)) if missing != 0 else values.dtype
        per_token = np.full(at_positions.shape, missing, dtype)
        per_token[1:] = at_positions[:-1]
        found.append(per_token)
    return found


def _check(lengths: np.ndarray, quantum: int, max_row_tokens: int) -> int:
    """Largest allowed row length, or the error that says which sample does not fit."""
    if len(lengths) == 0:
        raise ValueError("nothing to pack: no samples were given")
    if not 0 < quantum <= max_row_tokens:
        raise ConfigError(f"row quantum {quantum} must be between 1 and max_row_tokens {max_row_tokens}")
    if lengths.min() < 1:
        raise ValueError(f"sample {int(lengths.argmin())} has no tokens; drop it before packing")
    largest = max_row_tokens // quantum * quantum
    if lengths.max() > largest:
        raise ConfigError(
            f"sample {int(lengths.argmax())} has {int(lengths.max())} tokens, a row holds at most {largest} "
            f"(max_row_tokens {max_row_tokens}, a multiple of {quantum}): raise it or shorten the samples"
        )
    return largest


def _place(lengths: np.ndarray, quantum: int, largest: int) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Row and start of each sample, row length and number of rows.

    The fewest rows the largest length needs are kept, and the row is then made as short as still
    fits: no half-empty last row.
    """
    total = int(lengths.sum())
    rows, starts, num_rows = _first_fit_decreasing(lengths, largest)
    balanced = max(int(lengths.max()), -(-total // num_rows))
    row_tokens = -(-balanced // quantum) * quantum
    for shorter in range(row_tokens, min(row_tokens + 3 * quantum, largest), quantum):
        tried = _first_fit_decreasing(lengths, shorter)
        if tried[2] <= num_rows:
            return tried[0], tried[1], shorter, tried[2]
    return rows, starts, largest, num_rows


def _first_fit_decreasing(lengths: np.ndarray, row_tokens: int) -> tuple[np.ndarray, np.ndarray, int]:
    """First-fit decreasing, one vector operation per distinct length.

    Equal items are consecutive in the order, so first-fit puts as many as fit into the first row,
    then the next: a floor division and a cumulative sum. Ties keep the order of the input.
    """
    order = np.argsort(-lengths, kind="stable")
    rows = np.empty(len(lengths), np.int64)
    starts = np.empty(len(lengths), np.int64)
    free = np.empty(len(lengths), np.int64)  # at most one row per sample
    num_rows, done = 0, 0
    sizes, counts = np.unique(-lengths, return_counts=True)
    for size, count in zip((-sizes).tolist(), counts.tolist()):
        fits = np.flatnonzero(free[:num_rows] >= size)
        takes = free[fits] // size
        before = np.cumsum(takes) - takes
        takes = np.clip(count - before, 0, takes)
        rest = count - int(takes.sum())
        if rest:
            per_row = row_tokens // size
            new = -(-rest // per_row)
            free[num_rows : num_rows + new] = row_tokens
            fits = np.concatenate([fits, np.arange(num_rows, num_rows + new)])
            takes = np.concatenate([takes, np.full(new, per_row)])
            takes[-1] = rest - per_row * (new - 1)
            num_rows += new
        fits, takes = fits[takes > 0], takes[takes > 0]
        chosen = order[done : done + count]
        done += count
        rows[chosen] = np.repeat(fits, takes)
        starts[chosen] = np.repeat(row_tokens - free[fits], takes) + _ranges(takes) * size
        free[fits] -= takes * size
    return rows, starts, num_rows


def _order_in_row(rows: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """[S] 0, 1, 2, … from left to right in each row."""
    order = np.lexsort((starts, rows))
    first = np.flatnonzero(np.diff(rows[order], prepend=-1))
    sizes = np.diff(first, append=len(rows))
    result = np.empty(len(rows), np.int64)
    result[order] = _ranges(sizes)
    return result


def _ranges(sizes: np.ndarray) -> np.ndarray:
    """0 … sizes[0]-1, 0 … sizes[1]-1, … in one array."""
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - sizes, sizes)


def _flatten(parts: Sequence[Any], lengths: np.ndarray, dtype: Any, name: str) -> np.ndarray:
    """All samples end to end. ValueError when a sample's length differs from its token ids'."""
    if len(parts) != len(lengths):
        raise ValueError(f"{name}: {len(parts)} samples, token_ids has {len(lengths)}")
    own = np.fromiter(map(len, parts), np.int64, len(parts))
    if not np.array_equal(own, lengths):
        at = int(np.flatnonzero(own != lengths)[0])
        raise ValueError(f"{name}: sample {at} has {int(own[at])} values for {int(lengths[at])} tokens")
    if all(isinstance(part, np.ndarray) for part in parts):
        return np.concatenate(parts).astype(dtype, copy=False)
    return np.fromiter(chain.from_iterable(parts), dtype, int(lengths.sum()))


def _values(
    name: str, parts: Sequence[Any], lengths: np.ndarray, mask: np.ndarray, sample: np.ndarray
) -> np.ndarray:
    """One named array end to end, with "no value" turned into 0 where the mask is 0."""
    values = _flatten(parts, lengths, np.float32, name)
    holes = ~np.isfinite(values)
    bad = np.flatnonzero(holes & (mask > 0))
    if len(bad):
        raise ValueError(
            f"{name}: sample {int(sample[bad[0]])} has {values[bad[0]]} on a token with a loss; "
            "drop the token from the loss mask (and so from the denominator) or give it a value"
        )
    return np.where(holes, np.float32(0), values)


def _scatter(
    shape: tuple[int, int], dtype: Any, fill: int, place: np.ndarray, values: np.ndarray
) -> np.ndarray:
    flat = np.full(shape[0] * shape[1], fill, dtype)
    flat[place] = values
    return flat.reshape(shape)


def _slice_rows(packed: PackedRows, part: slice) -> PackedRows:
    fields = ("token_ids", "segment_ids", "position_ids", "target_ids", "loss_mask", "sample_index")
    return replace(
        packed,
        **{name: getattr(packed, name)[part] for name in fields},
        arrays={name: value[part] for name, value in packed.arrays.items()},
    )


def _check_rows(packed: PackedRows, values: np.ndarray) -> None:
    rows_needed = int(packed.rows.max()) + 1
    if values.ndim < 2 or values.shape[0] < rows_needed or values.shape[1] != packed.token_ids.shape[1]:
        raise ValueError(
            f"values {list(values.shape)} do not cover the packing of {rows_needed} rows of "
            f"{packed.token_ids.shape[1]}; concatenate the micro-batches along rows first"
        )
