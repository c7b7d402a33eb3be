"""Heterogeneous decode state: window ring, compressor tails, compressed caches (specification 8).

S slots (sequences), W sliding window, C head width, M compressed entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.model.config import CSA_RATIO, SLIDING, ModelConfig
from consilience.model.layout import ring_size


@dataclass
class CompressorState:
    """entries [S, M, width] finished entries; values, gates [S, ring, series] raw projections in fp32.

    The ring slot of a token is its position mod ring; gates already hold the position bias.
    """

    entries: Tensor
    values: Tensor
    gates: Tensor

    def tensors(self) -> list[Tensor]:
        return [self.entries, self.values, self.gates]


@dataclass
class LayerState:
    """window [S, W, C], slot = position mod W; compressor (CSA, HCA); index keys (CSA)."""

    window: Tensor
    compressor: CompressorState | None
    indexer: CompressorState | None

    def tensors(self) -> list[Tensor]:
        parts = [self.window]
        for part in (self.compressor, self.indexer):
            if part is not None:
                parts += part.tensors()
        return parts


class DecodeState:
    """Decode state of S sequences; `position` [S] counts the tokens each has consumed.

    Rows are independent: `view` narrows to a contiguous range without copying, `copy_from` forks
    streams. A slot is emptied by setting its position to 0: no mask reaches what stays behind.
    """

    def __init__(self, position: Tensor, layers: list[LayerState], max_length: int) -> None:
        self.position = position
        self.layers = layers
        self.max_length = max_length

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_slots: int,
        max_length: int,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> DecodeState:
        """Empty state for `num_slots` sequences of at most `max_length` tokens."""

        def compressor(width: int, ratio: int) -> CompressorState:
            series = 2 * width if ratio == CSA_RATIO else width
            ring = ring_size(ratio)
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            return CompressorState(
                torch.zeros(num_slots, max_length // ratio, width, device=device, dtype=dtype),
                torch.zeros(num_slots, ring, series, device=device, dtype=wide),
                torch.zeros(num_slots, ring, series, device=device, dtype=wide),
            )

        layers = []
        for ratio in config.compress_ratios:
            window = torch.zeros(
                num_slots, config.sliding_window, config.head_dim, device=device, dtype=dtype
            )
            main = None if ratio == SLIDING else compressor(config.head_dim, ratio)
            index = compressor(config.index_head_dim, ratio) if ratio == CSA_RATIO else None
            layers.append(LayerState(window, main, index))
        position = torch.zeros(num_slots, dtype=torch.long, device=device)
        return cls(position, layers, max_length)

    @property
    def num_slots(self) -> int:
        return self.position.shape[0]

    def tensors(self) -> list[Tensor]:
        return [self.position, *(t for layer in self.layers for t in layer.tensors())]

    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors())

    def view(self, start: int, stop: int) -> DecodeState:
        """Slots start..stop-1, sharing memory."""

        def part(state: CompressorState | None) -> CompressorState | None:
            return None if state is None else CompressorState(*(t[start:stop] for t in state.tensors()))

        layers = [
            LayerState(layer.window[start:stop], part(layer.compressor), part(layer.indexer))
            for layer in self.layers
        ]
        return DecodeState(self.position[start:stop], layers, self.max_length)

    def copy_from(self, other: DecodeState, source: list[int], target: list[int]) -> None:
        """Slot target[i] of this state becomes the sequence in slot source[i] of `other` (a fork).

        The two lists must not overlap when `other` is this state.
        """
        if source:
            for mine, theirs in zip(self.tensors(), other.tensors()):
                mine[target] = theirs[source]
