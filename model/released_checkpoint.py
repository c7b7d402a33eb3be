"""A folder of weights in any layout, opened: checked as a whole, then read by rows (specification 11).

    official      released names; FP8 and packed FP4 with `.scale` beside them
    native        released names, nothing quantised (what training writes, what vLLM loads)
    transformers  names of its modules with packed experts, or those of its `save_pretrained`

Opening reads headers, config.json and the hash tables, and nothing is handed out unless all of them
fit the model that config.json describes. Reading holds one block of rows at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consilience.conf.errors import CheckpointError, ConfigError
from consilience.model.checkpoint import expected_shapes
from consilience.model.config import ModelConfig
from consilience.model.number_formats import FP8_TILE, decode_fp8, decode_mxfp4
from consilience.model.released_entries import (
    TILES,
    Entry,
    check_entry,
    check_names,
    expert_form,
    join_entries,
    layout_of,
)
from consilience.model.shards import INDEX, SINGLE, Stored, read_folder, read_header, read_index, read_rows
from consilience.model.tensor_names import Kind, kind_of, official_of

CONFIG = "config.json"
BLOCK_VALUES = 1 << 21  # values of a block: 8 MiB once decoded to fp32


@dataclass(frozen=True)
class ReleasedCheckpoint:
    """Every tensor of a model under its official name, with the config that describes the model.

    folder    where it lies
    row       config.json as it is
    config    the model; `expert_dtype` and the MTP blocks are those that the tensors say
    layout    "official", "native" or "transformers"
    entries   official name -> where the tensor lies, in the order of the model
    left_out  stored `mtp.*` tensors that the model of `config` has no place for: DSpark's stages
    """

    folder: Path
    row: Mapping[str, Any]
    config: ModelConfig
    layout: str
    entries: Mapping[str, Entry]
    left_out: tuple[Stored, ...]

    def read(
        self,
        name: str,
        rows: slice | None = None,
        columns: slice | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """A tensor, or those rows and columns of it: values of `dtype` on `device`, in memory of their own.

        dtype None: as stored, and float32 where quantised. Parts of a quantised tensor are cut from the
        tiles they touch. CheckpointError if a file changed meanwhile or a scale is no scale.
        """
        entry = self.entries[name]
        first, last = _bounds(rows, entry.shape[0])
        if entry.scale is None:
            values = read_rows(entry.payload, entry.first_row + first, entry.first_row + last)
            values = values if columns is None else values[:, columns]
            return values.to(device=device, dtype=dtype).contiguous()
        tile_rows, tile_columns = TILES[entry.form]
        left, right = _bounds(columns, entry.shape[1])
        top, begin = first - first % tile_rows, left - left % tile_columns
        payload, scale = self.read_quantised(name, top, min(_up(last, tile_rows), entry.shape[0]))
        width = min(_up(right, tile_columns), entry.shape[1])
        halved = 2 if entry.form == "fp4" else 1
        payload = payload[:, begin // halved : -(-width // halved)].contiguous().to(device)
        scale = scale[:, begin // tile_columns : -(-width // tile_columns)].contiguous().to(device)
        decode = decode_mxfp4 if entry.form == "fp4" else decode_fp8
        try:
            values = decode(payload, scale, dtype or torch.float32)
        except ValueError as error:
            raise CheckpointError(f"{entry.scale.file}: tensor {entry.scale.name}: {error}") from error
        return values[first - top : last - top, left - begin : right - begin]

    def read_quantised(self, name: str, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Codes and scales as stored, rows first to last; both lie on borders of tiles."""
        entry = self.entries[name]
        assert entry.scale is not None
        tile_rows = TILES[entry.form][0]
        payload = read_rows(entry.payload, first, last)
        return payload, read_rows(entry.scale, first // tile_rows, -(-last // tile_rows))


def find_tensor(folder: Path, official: str) -> Stored:
    """Where a folder of any layout has the tensor of this official name, which is no expert's.

    Of the shards only the tensor's own header is read. CheckpointError as `open_checkpoint`.
    """
    if (folder / SINGLE).is_file() and not (folder / INDEX).is_file():
        shard_of = dict.fromkeys(read_header(folder / SINGLE), SINGLE)
    else:
        shard_of = read_index(folder / INDEX)
    name = next((name for name in shard_of if official_of(name) == official), official)
    listed = folder / shard_of.get(name, INDEX)
    found = read_header(listed) if name in shard_of else {}
    if name not in found:
        raise CheckpointError(f"{listed}: tensor {name} is missing; restore or remake the checkpoint")
    return found[name]


class TensorsOnDisk(Mapping[str, Tensor]):
    """The tensors of a checkpoint by official name, each read when it is asked for.

    dtypes  official name -> the type it is read in; without them as `ReleasedCheckpoint.read` does
    """

    def __init__(
        self, checkpoint: ReleasedCheckpoint, dtypes: Mapping[str, torch.dtype] | None = None
    ) -> None:
        self._checkpoint, self._dtypes = checkpoint, dtypes or {}

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.read(name, dtype=self._dtypes.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.entries)

    def __len__(self) -> int:
        return len(self._checkpoint.entries)


def open_checkpoint(folder: Path) -> ReleasedCheckpoint:
    """A folder of weights with its config.json, every header checked.

    CheckpointError names file, tensor, what was found and what is expected: a truncated or missing
    shard, a missing or unexpected tensor, a wrong shape or type, a scale that is missing, of a wrong
    type or shape, a hash table that points past the experts.
    """
    folder = Path(folder)
    row, config = read_config(folder)
    stored = read_folder(folder)
    entries = join_entries(stored)
    has_mtp = any(name.startswith("mtp.") for name in entries)
    if not has_mtp:
        config = replace(config, num_nextn_predict_layers=0, mtp_compress_ratios=())
    expected = expected_shapes(config)
    is_known = any(name.startswith("mtp.") for name in expected)
    outside = [entries.pop(n) for n in list(entries) if n.startswith("mtp.") and not is_known]
    left_out = tuple(t for entry in outside for t in (entry.payload, entry.scale) if t is not None)
    check_names(folder, entries, expected)
    layout = layout_of(stored)
    for name, shape in expected.items():
        check_entry(name, entries[name], shape, config, layout)
    entries = {name: entries[name] for name in expected}
    config = replace(config, expert_dtype=expert_form(entries))
    found = ReleasedCheckpoint(folder, row, config, layout, entries, left_out)
    _check_hash_tables(found)
    return found


def read_config(folder: Path) -> tuple[dict[str, Any], ModelConfig]:
    """config.json as it is, and the model that it describes. CheckpointError if it cannot be used."""
    path = Path(folder) / CONFIG
    try:
        row = json.loads(path.read_text("utf-8"))
        if not isinstance(row, dict):
            raise ValueError("it holds no table of fields")
        return row, ModelConfig.from_json_dict(row)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing; the folder is no checkpoint or not a complete one"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore or remake the checkpoint") from error
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def blocks_of(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """[first, last) rows of the blocks in which a tensor is worked on; borders are those of tiles."""
    num_rows = shape[0]
    step = max(BLOCK_VALUES // max(math.prod(shape[1:]), 1) // FP8_TILE[0], 1) * FP8_TILE[0]
    return ((first, min(first + step, num_rows)) for first in range(0, num_rows, step))


def _check_hash_tables(checkpoint: ReleasedCheckpoint) -> None:
    last = checkpoint.config.n_routed_experts - 1
    for name, entry in checkpoint.entries.items():
        if kind_of(name) is Kind.INT64:
            table = checkpoint.read(name)
            low, high = int(table.min()), int(table.max())
            if low < 0 or high > last:
                raise CheckpointError(
                    f"{entry.payload.file}: tensor {entry.payload.name} has expert ids from {low} to {high}, "
                    f"expected 0 to {last}"
                )


def _bounds(part: slice | None, size: int) -> tuple[int, int]:
    first, last, _ = (part or slice(None)).indices(size)
    return first, last


def _up(size: int, tile: int) -> int:
    return -(-size // tile) * tile
