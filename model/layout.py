"""Where every token of a forward stands: positions, what it may see, compression windows.

Built once per forward and shared by all layers. One description serves packed training rows,
prefill chunks and single-token decoding, so that the three cannot drift apart. Samples are
contiguous, so what a query sees is a range of keys: two integers a query, never a T × T mask.

B rows, T tokens in a row, W sliding window, M compressed entries, m compression ratio.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from consilience.model.config import CSA_RATIO, ModelConfig
from consilience.model.rope import inverse_frequencies, rotations

if TYPE_CHECKING:
    from consilience.model.context_parallel import Piece
    from consilience.model.forward_trace import Trace
    from consilience.model.routing import Routing
    from consilience.model.state import DecodeState


@dataclass(frozen=True)
class Closing:
    """Compression windows of one ratio m that close inside this forward.

    row, column [E]     where each new entry belongs in the [B, M] entry axis
    source [E, S]       index of each pooled slot in the flattened (ring ‖ new tokens) axis, or that of
                        (tail ‖ new tokens) in a piece of rows; S = 2m for CSA (previous window first),
                        m for HCA
    is_present [E, S]   False for slots before the sample's first token (CSA's entry 0)
    position [E]        of the window's first token, for RoPE
    """

    row: Tensor
    column: Tensor
    source: Tensor
    is_present: Tensor
    position: Tensor


@dataclass(frozen=True)
class EntryPlaces:
    """Which entries the windows that close in each rank's piece of the rows become.

    counts        of each rank
    target [ΣE]   in the order of the ranks, each one's as its `Closing` has them: row · M + column
    """

    counts: list[int]
    target: Tensor


@dataclass(frozen=True)
class Windows:
    """Entries of one ratio m, and who sees which.

    find_closing        makes `closing`, which the compiled decoding step does not need
    find_places         makes `places`, which only pieces of rows need
    num_columns         M
    first, stop [B, T]  a query sees the columns first … stop - 1
    ratio, earlier      no query t sees a column at or beyond (earlier + t + 1) // ratio
    """

    find_closing: Callable[[], Closing]
    num_columns: int
    first: Tensor
    stop: Tensor
    ratio: int
    earlier: int
    find_places: Callable[[], EntryPlaces] | None = None

    @cached_property
    def closing(self) -> Closing:
        return self.find_closing()

    @cached_property
    def places(self) -> EntryPlaces:
        assert self.find_places is not None
        return self.find_places()

    def columns_before(self, token: int) -> int:
        """Columns that queries before `token` can see at most."""
        return min(self.num_columns, (self.earlier + token) // self.ratio)


@dataclass(frozen=True)
class Layout:
    """position, is_valid [B, T]; rotation tables; visible window keys; one `Windows` per ratio.

    The window's key axis holds `offset` earlier keys (0 in packed rows, W on a decode state, up to W - 1 in a
    `piece` of packed rows) and the new tokens; query t sees its keys oldest[b, t] … offset + t. Where every
    row gets a single token (`is_step`), `ring_seen` says the same of the window ring: attention then reads
    the ring in place. In a piece T is the tokens of this rank, and M the entries of all.
    """

    position: Tensor
    is_valid: Tensor
    sliding_rotation: Tensor
    compressed_rotation: Tensor
    frequencies: dict[bool, Tensor]
    offset: int
    oldest: Tensor
    windows: dict[int, Windows]
    state: DecodeState | None = None
    lengths: Tensor | None = None
    is_step: bool = False
    trace: Trace | None = field(default=None, compare=False)
    routing: Routing | None = field(default=None, compare=False)
    piece: Piece | None = None

    def cut(self, x: Tensor) -> Tensor:
        """What these tokens have of x [B, all tokens of the rows, …]: all, or their piece."""
        return x if self.piece is None else self.piece.cut(x)

    @cached_property
    def sample(self) -> Tensor:
        """[R] number of the sample that each flattened token belongs to, -1 for padding."""
        if self.piece is not None:
            return self.piece.cut(self.piece.sample).flatten()
        return sample_numbers(self.position, self.is_valid).flatten()

    @cached_property
    def ring_seen(self) -> Tensor:
        """bool [B, ring]: the slots that the query of a step sees, its own included."""
        assert self.is_step and self.state is not None
        ring = self.offset + self.state.lookahead
        age = (self.position - torch.arange(ring, device=self.position.device)) % ring
        return (age < self.offset) & (age <= self.position)

    def without_last(self) -> Layout:
        """The same packed rows, the last valid token of every sample no longer counted as valid."""
        if self.piece is None:
            return replace(self, is_valid=_followed(self.position, self.is_valid))
        piece = replace(self.piece, is_valid=_followed(self.piece.position, self.piece.is_valid))
        return replace(self, is_valid=piece.cut(piece.is_valid), piece=piece)


def sample_numbers(position: Tensor, is_valid: Tensor) -> Tensor:
    """[B, T] number of the sample of each token of packed rows, counted over all rows; -1 for padding."""
    starts = (position == 0) & is_valid
    starts[:, 0] = True
    return torch.where(is_valid, starts.flatten().cumsum(0).view_as(position) - 1, -1)


def _followed(position: Tensor, is_valid: Tensor) -> Tensor:
    """bool [B, T]: valid tokens whose sample has a valid one behind them."""
    is_followed = torch.zeros_like(is_valid)
    is_followed[:, :-1] = is_valid[:, 1:] & (position[:, 1:] == position[:, :-1] + 1)
    return is_valid & is_followed


def ring_size(ratio: int) -> int:
    """Raw projections a compressor needs per sequence: two windows for CSA, one for HCA."""
    return 2 * ratio if ratio == CSA_RATIO else ratio


def _closing(ratio: int, position: Tensor, is_valid: Tensor, ring: int, number: Tensor) -> Closing:
    """Windows that close; number [B, T] = the column of an entry that closes with the token."""
    num_tokens = position.shape[1]
    closes = ((position + 1) % ratio == 0) & is_valid
    row, token = closes.nonzero(as_tuple=True)
    end = position[row, token]
    back = torch.arange(ring_size(ratio) - 1, -1, -1, device=position.device)
    in_chunk = token[:, None] - back
    is_present = end[:, None] - back >= 0
    start = row[:, None] * (ring + num_tokens)
    source = start + ring + in_chunk
    if ring:
        source = torch.where(in_chunk >= 0, source, start + (end[:, None] - back) % ring)
    source = torch.where(is_present, source, start)
    return Closing(row, number[row, token], source, is_present, position=end - (ratio - 1))


def _packed_windows(ratio: int, position: Tensor, is_valid: Tensor, piece: Piece | None) -> Windows:
    """Entries of a row are numbered in the order in which their windows close, over all its samples."""
    closes = ((position + 1) % ratio == 0) & is_valid
    closed = closes.long().cumsum(1)
    own = torch.where(is_valid, (position + 1) // ratio, 0)
    num_columns = int(closed[:, -1].max()) if closed.numel() else 0
    if piece is None:
        return Windows(
            find_closing=lambda: _closing(ratio, position, is_valid, 0, closed - 1),
            num_columns=num_columns,
            first=closed - own,
            stop=closed,
            ratio=ratio,
            earlier=0,
        )
    tail = piece.tail(ring_size(ratio) - 1)
    reach = slice(piece.start - tail, piece.stop)
    is_own = is_valid[:, reach].clone()
    is_own[:, :tail] = False  # their windows close on the ranks before
    return Windows(
        find_closing=lambda: _closing(ratio, position[:, reach], is_own, 0, closed[:, reach] - 1),
        num_columns=num_columns,
        first=piece.cut(closed - own),
        stop=piece.cut(closed),
        ratio=ratio,
        earlier=piece.start,
        find_places=lambda: _places(closes, closed - 1, num_columns, piece),
    )


def _places(closes: Tensor, number: Tensor, num_columns: int, piece: Piece) -> EntryPlaces:
    """Of the tokens with which a window closes, bool [B, T], and their entries' columns [B, T]."""
    found = []
    for start, stop in pairwise(piece.borders):
        row, token = closes[:, start:stop].nonzero(as_tuple=True)
        found.append(row * num_columns + number[row, start + token])
    return EntryPlaces([len(target) for target in found], torch.cat(found))


def _chunk_windows(
    ratio: int, position: Tensor, is_valid: Tensor, ring: int, earlier: int, end: int
) -> Windows:
    """Entries of a row are numbered by position; `earlier`, `end` = the longest row before and after."""
    # Padding would see past the longest row.
    stop = ((position + 1) // ratio).clamp(max=end // ratio)
    return Windows(
        find_closing=lambda: _closing(ratio, position, is_valid, ring, position // ratio),
        num_columns=end // ratio,
        first=torch.zeros_like(stop),
        stop=stop,
        ratio=ratio,
        earlier=earlier,
    )


def packed_layout(
    config: ModelConfig,
    segment: Tensor,
    position: Tensor,
    trace: Trace | None,
    piece: Piece | None = None,
) -> Layout:
    """Layout of packed rows without a decode state, or of this rank's `piece` of them.

    segment [B, T] int, -1 = padding; position [B, T] restarts at 0 in each segment.
    """
    frequencies = _frequencies(config, segment.device)
    is_valid = segment >= 0
    windows = {m: _packed_windows(m, position, is_valid, piece) for m in config.ratios}
    offset = 0
    if piece is not None:
        offset = piece.tail(config.sliding_window - 1)
        position, is_valid = piece.cut(position), piece.cut(is_valid)
    token = torch.arange(position.shape[1], device=segment.device)
    reach = torch.where(is_valid, position, 0).clamp(max=config.sliding_window - 1)
    return Layout(
        position=position,
        is_valid=is_valid,
        sliding_rotation=rotations(position, frequencies[False]),
        compressed_rotation=rotations(position, frequencies[True]),
        frequencies=frequencies,
        offset=offset,
        oldest=offset + token - reach,
        windows=windows,
        trace=trace,
        piece=piece,
    )


def chunk_layout(
    config: ModelConfig,
    state: DecodeState,
    num_tokens: int,
    lengths: Tensor | None,
    trace: Trace | None,
    longest: int | None = None,
) -> Layout:
    """Layout of a chunk that continues `state`: row b gets lengths[b] new tokens (None: all of T).

    longest = tokens that no row will exceed; None asks the state, which waits for its device.
    """
    frequencies = _frequencies(config, state.position.device)
    window = config.sliding_window
    token = torch.arange(num_tokens, device=state.position.device)
    position = state.position[:, None] + token
    if lengths is None:
        is_valid = torch.ones_like(position, dtype=torch.bool)
        end = int(state.position.max()) + num_tokens if longest is None else longest
        earlier = end - num_tokens
    else:
        is_valid = token < lengths[:, None]
        end = int((state.position + lengths).max()) if longest is None else longest
        earlier = int(state.position.max()) if longest is None else longest
    rings = {m: ring_size(m) + state.lookahead for m in config.ratios}
    return Layout(
        position=position,
        is_valid=is_valid,
        sliding_rotation=rotations(position, frequencies[False]),
        compressed_rotation=rotations(position, frequencies[True]),
        frequencies=frequencies,
        offset=window,
        oldest=window + token - position.clamp(max=window - 1),
        windows={m: _chunk_windows(m, position, is_valid, rings[m], earlier, end) for m in config.ratios},
        state=state,
        lengths=lengths,
        is_step=num_tokens == 1 and lengths is None,
        trace=trace,
    )


@cache
def _frequencies(config: ModelConfig, device: torch.device) -> dict[bool, Tensor]:
    """Radians per token of sliding layers (False) and of layers with compression (True)."""
    with torch.inference_mode(False):
        return {c: inverse_frequencies(config, is_compressed=c, device=device) for c in (False, True)}
