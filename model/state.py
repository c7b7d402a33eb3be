"""Heterogeneous decode state: window ring, compressor tails, paged compressed entries (specification 8).

Every compressed layer keeps its entries in blocks of lcm(4, 128) = 128 tokens' worth (32 CSA entries or
one HCA entry). A sequence owns a list of blocks, and complete blocks may belong to several sequences: a
fork copies the fixed-size part (rings, the block being filled) and shares the rest.

S slots (sequences), W sliding window, C head width, P blocks of the pool, A blocks a sequence may have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.model.config import CSA_RATIO, SLIDING, ModelConfig
from consilience.model.layout import ring_size


class BlockPool:
    """Which blocks are free, and how many sequences hold each of the others. Block 0 is nobody's.

    Its content is never visible: unused places of the block tables point there.
    """

    def __init__(self, num_blocks: int) -> None:
        self.holders = [0] * (num_blocks + 1)
        self.free = list(range(num_blocks, 0, -1))

    def take(self, count: int) -> list[int]:
        """`count` free blocks. EngineError if there are fewer: nothing is taken then."""
        if count > len(self.free):
            raise EngineError(
                f"the decode state needs {count} more blocks, {len(self.free)} of {len(self.holders) - 1} "
                "are free; run fewer sequences at once or allocate more blocks"
            )
        taken = [self.free.pop() for _ in range(count)]
        for block in taken:
            self.holders[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            self.holders[block] += 1

    def give_back(self, blocks: list[int]) -> None:
        for block in blocks:
            self.holders[block] -= 1
            if self.holders[block] == 0:
                self.free.append(block)


@dataclass
class CompressorState:
    """entries [P, per, width] finished entries, `per` a block; values, gates [S, ring, series] fp32.

    The ring slot of a token is its position mod ring; gates already hold the position bias.
    """

    entries: Tensor
    values: Tensor
    gates: Tensor

    def write(self, tables: Tensor, row: Tensor, column: Tensor, entries: Tensor) -> None:
        """Entry column[e] of sequence row[e] becomes entries[e]."""
        per = self.entries.shape[1]
        self.entries[tables[row, column // per], column % per] = entries

    def read(self, tables: Tensor, num_columns: int) -> Tensor:
        """The first `num_columns` entries of every sequence: [S, num_columns, width], a copy."""
        per, width = self.entries.shape[1:]
        used = tables[:, : -(-num_columns // per)]
        pages = self.entries.index_select(0, used.flatten())
        return pages.view(len(tables), used.shape[1] * per, width)[:, :num_columns]


@dataclass
class LayerState:
    """window [S, W + lookahead, C], slot = position mod its size; compressor (CSA, HCA); index keys (CSA)."""

    window: Tensor
    compressor: CompressorState | None
    indexer: CompressorState | None

    def parts(self) -> list[CompressorState]:
        return [part for part in (self.compressor, self.indexer) if part is not None]

    def rings(self) -> list[Tensor]:
        """What every sequence has of its own: [S, …] each."""
        return [self.window, *(ring for part in self.parts() for ring in (part.values, part.gates))]

    def pages(self) -> list[Tensor]:
        """What lies in blocks: [P, …] each."""
        return [part.entries for part in self.parts()]


class DecodeState:
    """Decode state of S sequences; `position` [S] counts the tokens each has consumed.

    tables [S, A] block of each stretch of `block_tokens` tokens. Rows are independent: `view` narrows
    to a contiguous range without copying. With `lookahead` = n, a row may be set back, by
    lowering its position, to n + 1 tokens below the longest it has been, also after a fork. `free` empties a
    row; one that shares no blocks may also be emptied by position 0: no mask reaches what stays behind.
    """

    def __init__(
        self,
        position: Tensor,
        tables: Tensor,
        owned: list[list[int]],
        pool: BlockPool,
        layers: list[LayerState],
        block_tokens: int,
        lookahead: int,
    ) -> None:
        self.position = position
        self.tables = tables
        self.owned = owned
        self.pool = pool
        self.layers = layers
        self.block_tokens = block_tokens
        self.lookahead = lookahead

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_slots: int,
        max_length: int,
        *,
        num_blocks: int | None = None,
        lookahead: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> DecodeState:
        """Empty state for `num_slots` sequences of at most `max_length` tokens.

        num_blocks  size of the pool; rows then get blocks by `reserve`. None: every row has all its
                    blocks at once.
        """
        block_tokens = config.block_tokens
        per_row = cls.blocks_of(config, max_length)
        pool = BlockPool(num_slots * per_row if num_blocks is None else num_blocks)
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*shape, device=device, dtype=of)

        def compressor(width: int, ratio: int) -> CompressorState:
            series = 2 * width if ratio == CSA_RATIO else width
            ring = ring_size(ratio) + lookahead
            entries = zeros(len(pool.holders), block_tokens // ratio, width)
            values, gates = (zeros(num_slots, ring, series, of=wide) for _ in range(2))
            return CompressorState(entries, values, gates)

        layers = []
        for ratio in config.compress_ratios:
            window = zeros(num_slots, config.sliding_window + lookahead, config.head_dim)
            main = None if ratio == SLIDING else compressor(config.head_dim, ratio)
            index = compressor(config.index_head_dim, ratio) if ratio == CSA_RATIO else None
            layers.append(LayerState(window, main, index))
        position, tables = zeros(num_slots, of=torch.long), zeros(num_slots, per_row, of=torch.long)
        owned: list[list[int]] = [[] for _ in range(num_slots)]
        state = cls(position, tables, owned, pool, layers, block_tokens, lookahead)
        if num_blocks is None:
            for row in range(num_slots):
                state.reserve(row, max_length)
        return state

    @staticmethod
    def blocks_of(config: ModelConfig, length: int) -> int:
        """Blocks that a sequence of `length` tokens takes."""
        return -(-length // config.block_tokens)

    @property
    def num_slots(self) -> int:
        return self.position.shape[0]

    def tensors(self) -> list[Tensor]:
        """Every tensor of the state; those of the blocks belong to all views."""
        return [self.position, self.tables, *(t for x in self.layers for t in x.rings() + x.pages())]

    def num_bytes(self) -> int:
        return sum(t.nbytes for t in self.tensors())

    def capacity(self, row: int) -> int:
        """Tokens that the row's blocks hold."""
        return len(self.owned[row]) * self.block_tokens

    def check_room(self, new_tokens: Tensor | int) -> None:
        """EngineError where a row's blocks do not hold `new_tokens` (each row's, or [S]) more."""
        grown = (self.position + new_tokens).tolist()
        for row, length in enumerate(grown):
            if length > self.capacity(row):
                raise EngineError(
                    f"decode state holds {self.capacity(row)} tokens, a row would reach {length}; "
                    "raise rollout.max_length"
                )

    def reserve(self, row: int, length: int) -> None:
        """Give `row` blocks up to `length` tokens. EngineError, and no change, where that is impossible."""
        wanted = self._num_blocks(length)
        held = self.owned[row]
        if wanted > len(held):
            new = self.pool.take(wanted - len(held))
            self.tables[row, len(held) : wanted] = torch.tensor(new, device=self.tables.device)
            held += new

    def _num_blocks(self, length: int) -> int:
        """Blocks that `length` tokens take. EngineError where no row can have so many."""
        wanted = -(-length // self.block_tokens)
        if wanted > self.tables.shape[1]:
            raise EngineError(
                f"a sequence of {length} tokens was asked for, the decode state holds "
                f"{self.tables.shape[1] * self.block_tokens}; raise rollout.max_length"
            )
        return wanted

    def free(self, row: int) -> None:
        """Empty the row and give its blocks back."""
        self.pool.give_back(self.owned[row])
        self.owned[row].clear()
        self.tables[row] = 0
        self.position[row] = 0

    def view(self, start: int, stop: int, length: int | None = None) -> DecodeState:
        """Slots start..stop-1, sharing memory and pool; with tables of `length` tokens at least, or whole."""

        def part(state: CompressorState | None) -> CompressorState | None:
            if state is None:
                return None
            return CompressorState(state.entries, state.values[start:stop], state.gates[start:stop])

        layers = [
            LayerState(layer.window[start:stop], part(layer.compressor), part(layer.indexer))
            for layer in self.layers
        ]
        tables = self.tables[start:stop]
        if length is not None:
            tables = tables[:, : -(-length // self.block_tokens)]
        own = (self.position[start:stop], tables, self.owned[start:stop])
        return DecodeState(*own, self.pool, layers, self.block_tokens, self.lookahead)

    def fork(self, source: list[int], target: list[int]) -> None:
        """Row target[i] becomes a copy of row source[i] that goes its own way.

        Blocks that setting back cannot reach are shared; the rest, and the fixed-size part, are copied.
        Targets lose what they held; the two lists must not overlap. A target gets as many blocks as its
        source. EngineError where the pool has too few: the targets are empty then.
        """
        if not source:
            return
        for row in target:
            self.free(row)
        lengths = self.position[source].tolist()
        num_shared = [max(n - self.lookahead - 1, 0) // self.block_tokens for n in lengths]
        own = self.pool.take(sum(len(self.owned[o]) - n for o, n in zip(source, num_shared)))
        copies: list[tuple[int, int]] = []
        for row, origin, length, shared in zip(target, source, lengths, num_shared):
            held = self.owned[origin]
            self.pool.share(held[:shared])
            new, own = own[: len(held) - shared], own[len(held) - shared :]
            self.owned[row] += held[:shared] + new
            copies += zip(held[shared : self._num_blocks(length)], new)
        self.tables[target] = self._table(target)
        self.position[target] = self.position[source]
        old, new = [a for a, _ in copies], [b for _, b in copies]
        for layer in self.layers:
            for ring in layer.rings():
                ring[target] = ring[source]
            for pages in layer.pages() if copies else ():
                pages[new] = pages[old]

    def move(self, source: list[int], target: list[int]) -> None:
        """Rows source[i] become rows target[i] with their blocks; the sources are left empty.

        Targets lose what they held; the two lists must not overlap.
        """
        if not source:
            return
        for row, origin in zip(target, source):
            self.pool.give_back(self.owned[row])
            self.owned[row][:] = self.owned[origin]
            self.owned[origin].clear()
        for own in (self.position, self.tables, *(r for layer in self.layers for r in layer.rings())):
            own[target] = own[source]
        self.tables[source] = 0
        self.position[source] = 0

    def _table(self, rows: list[int]) -> Tensor:
        width = self.tables.shape[1]
        padded = [self.owned[row] + [0] * (width - len(self.owned[row])) for row in rows]
        return torch.tensor(padded, device=self.tables.device).view(len(rows), width)

    # ---- one sequence as tensors, for the disk -------------------------------------------------

    def export_row(self, row: int) -> dict[str, Tensor]:
        """All that sequence `row` needs to go on: position, rings and entries, by name."""
        used = self._blocks(row, int(self.position[row]))
        places = self._places(row).items()
        return {name: place[used] if ".pages." in name else place.clone() for name, place in places}

    def import_row(self, row: int, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `export_row`, into any row of a state of the same model and lookahead.

        The row loses what it held; it keeps as many blocks as it had, and gets more as needed. EngineError,
        and no change, where a tensor is missing, unknown or does not fit, or the sequence is too long; where
        the pool is exhausted, the row is left empty.
        """
        places = self._places(row)
        for name in sorted(tensors.keys() - places.keys()):
            raise EngineError(
                f"saved decode state: this model knows no {name}; it was saved by another model"
            )
        length = 0
        for name, place in places.items():
            found = tensors.get(name)
            shape = (self._num_blocks(length), *place.shape[1:]) if ".pages." in name else tuple(place.shape)
            if found is None or (found.dtype, tuple(found.shape)) != (place.dtype, shape):
                what = "missing" if found is None else f"{found.dtype} {tuple(found.shape)}"
                raise EngineError(
                    f"saved decode state: {name} is {what}, this model needs {place.dtype} {shape}; it was "
                    "saved by another model or with another lookahead"
                )
            if name == "position":
                length = int(found)
        wanted = max(length, self.capacity(row))
        self.free(row)
        self.reserve(row, wanted)
        used = self._blocks(row, length)
        for name, place in places.items():
            if ".pages." in name:
                place[used] = tensors[name].to(place.device)
            else:
                place.copy_(tensors[name])

    def _places(self, row: int) -> dict[str, Tensor]:
        """Where the tensors of sequence `row` lie, by name, its position first; pages are those of all."""
        places = {"position": self.position[row : row + 1]}
        for index, layer in enumerate(self.layers):
            places |= {f"layers.{index}.rings.{n}": ring[row] for n, ring in enumerate(layer.rings())}
            places |= {f"layers.{index}.pages.{n}": pages for n, pages in enumerate(layer.pages())}
        return places

    def _blocks(self, row: int, length: int) -> Tensor:
        """Numbers of the blocks that hold the row's first `length` tokens."""
        used = self.owned[row][: self._num_blocks(length)]
        return torch.tensor(used, dtype=torch.long, device=self.tables.device)
