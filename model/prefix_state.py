"""Pieces of a decode state from which a sequence's prefix comes back: blocks of entries, and the live rest.

At a position t the compressed entries of complete blocks never change again; besides them a sequence
needs, of every layer, the newest W - 1 window keys, the raw projections of open compression windows (and for
CSA half of those of the last closed one), and the entries of the open block. At a block's border nothing is
open. What lies in the rings besides is dead: no mask reaches it, and it is not stored (specification 8;
report 3.5).

W sliding window, C head width, n tokens, per entries a block, series raw channels of a compressor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from consilience.conf.errors import EngineError
from consilience.model.config import CSA_RATIO, ModelConfig
from consilience.model.state import CompressorState, DecodeState, LayerState
from consilience.model.transformer import Transformer


@dataclass(frozen=True)
class _Place:
    """Rows `index` of `base` [slots, …], which shares the state's memory."""

    base: Tensor
    index: Tensor

    def read(self) -> Tensor:
        return self.base[self.index]


def block_of(state: DecodeState, row: int, block: int) -> dict[str, Tensor]:
    """Entries of a complete block of sequence `row` by name; at the released ratios a CSA layer has [32, C]
    and index keys, an HCA layer [1, C]."""
    number = state.owned[row][block]
    return {name: pages[number].clone() for name, pages in _pages(state)}


def rest_of(state: DecodeState, row: int) -> dict[str, Tensor]:
    """What sequence `row` needs besides its complete blocks, where it stands; rings in order of position."""
    length = int(state.position[row])
    return {name: place.read() for name, place in _rest_places(state, row, length)}


def restore(
    state: DecodeState,
    row: int,
    length: int,
    blocks: Sequence[Mapping[str, Tensor]],
    rest: Mapping[str, Tensor] | None,
) -> None:
    """Sequence `row` becomes one of `length` tokens, from its complete blocks and its rest.

    rest None: its rings hold nothing yet (`recompute_window` fills them). The row loses what it held, and
    keeps as many blocks as it had. EngineError, and an empty row, where a tensor is missing or does not fit.
    """
    wanted = max(length, state.capacity(row))
    state.free(row)
    if len(blocks) != length // state.block_tokens:
        raise EngineError(f"{len(blocks)} blocks of {state.block_tokens} tokens are no {length} tokens")
    state.reserve(row, wanted)
    numbers = state.owned[row][: len(blocks)]
    writes: list[tuple[_Place, Tensor]] = []
    for name, pages in _pages(state) if blocks else ():
        first = _Place(pages[numbers[0]], torch.arange(pages.shape[1], device=pages.device))
        found = [_fitting(name, first, block, state, row) for block in blocks]
        writes.append((_Place(pages, torch.tensor(numbers, device=pages.device)), torch.stack(found)))
    for name, place in _rest_places(state, row, length) if rest is not None else ():
        writes.append((place, _fitting(name, place, rest or {}, state, row)))
    for place, tensor in writes:
        place.base[place.index] = tensor.to(place.base.device)
    state.position[row] = length


def _fitting(name: str, place: _Place, found: Mapping[str, Tensor], state: DecodeState, row: int) -> Tensor:
    """The tensor of that name, or EngineError and an empty row where it does not fit its place."""
    tensor, shape = found.get(name), (len(place.index), *place.base.shape[1:])
    if tensor is None or (tensor.dtype, tuple(tensor.shape)) != (place.base.dtype, shape):
        state.free(row)
        what = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
        raise EngineError(
            f"stored prefix: {name} is {what}, this model needs {place.base.dtype} {shape}; it was stored by "
            "another model"
        )
    return tensor


def window_reach(config: ModelConfig) -> int:
    """Tokens to compute again for every layer's newest keys and projections, entries being there.

    A layer's input at a token depends on the window of the layer before: L layers of W - 1 tokens. The last
    layer's own W - 1 are all it needs, or the 4 of its compressor where a window is shorter.
    """
    step = config.sliding_window - 1
    return (config.num_hidden_layers - 1) * step + max(step, CSA_RATIO)


@torch.no_grad()
def recompute_window(model: Transformer, state: DecodeState, row: int, ids: Sequence[int], most: int) -> int:
    """Fill the rings of sequence `row`, which has the entries of `ids` (whole blocks): tokens computed.

    The newest `window_reach` tokens go through the model once more, `most` at a time. Where they begin, the
    keys before them are missing, and what comes out is wrong; a layer on, it is wrong for W - 1 tokens more,
    and right behind these. Entries stand as they are: those made of wrong values are not written.
    """
    start = max(0, len(ids) - window_reach(model.config))
    view = state.view(row, row + 1)
    view.layers = [LayerState(x.window, _standing(x.compressor), _standing(x.indexer)) for x in view.layers]
    view.position[:] = start
    for at in range(start, len(ids), most):
        tokens = torch.tensor([ids[at : at + most]], device=state.position.device)
        # With lengths given, one token is a chunk too: a step's kernels would write entries.
        lengths = torch.full((1,), tokens.shape[1], device=tokens.device)
        model.streams(tokens, state=view, lengths=lengths)
    return len(ids) - start


class _Standing(CompressorState):
    """Finished entries that are read and not written."""

    def write(self, tables: Tensor, row: Tensor, column: Tensor, entries: Tensor) -> None:
        del tables, row, column, entries


def _standing(part: CompressorState | None) -> CompressorState | None:
    return None if part is None else _Standing(part.entries, part.values, part.gates)


def _pages(state: DecodeState) -> Iterator[tuple[str, Tensor]]:
    """Entries [P, per, C] of every compressor and indexer, by name."""
    for index, layer in enumerate(state.layers):
        for n, pages in enumerate(layer.pages()):
            yield f"layers.{index}.entries.{n}", pages


def _rest_places(state: DecodeState, row: int, length: int) -> Iterator[tuple[str, _Place]]:
    """Live slots of the row's rings at position `length`, and entries of the block that is open there."""
    is_open = length % state.block_tokens
    for name, pages in _pages(state) if is_open else ():
        finished = is_open * pages.shape[1] // state.block_tokens
        number = state.owned[row][length // state.block_tokens]
        yield name, _Place(pages[number], torch.arange(finished, device=pages.device))
    for index, layer in enumerate(state.layers):
        window = layer.window.shape[1] - state.lookahead
        newest = _positions(max(0, length - window + 1), length, layer.window.shape[1], state)
        yield f"layers.{index}.window", _Place(layer.window[row], newest)
        for n, part in enumerate(layer.parts()):
            ratio = state.block_tokens // part.entries.shape[1]
            closed, ring = length - length % ratio, part.values.shape[1]
            for name, whole in (("values", part.values[row]), ("gates", part.gates[row])):
                key = f"layers.{index}.{name}.{n}"
                yield f"{key}.open", _Place(whole, _positions(closed, length, ring, state))
                if ratio == CSA_RATIO:
                    last = _positions(max(0, closed - ratio), closed, ring, state)
                    # The next entry pools the first half of the channels of the window before its own.
                    yield f"{key}.closed", _Place(whole[:, : whole.shape[1] // 2], last)


def _positions(start: int, stop: int, ring: int, state: DecodeState) -> Tensor:
    """Ring slots of positions start … stop - 1."""
    return torch.arange(start, stop, device=state.position.device) % ring
