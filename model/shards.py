"""Safetensors files by hand: headers checked before a byte is used, rows read and written in place.

The safetensors library maps a whole shard and saves a whole dictionary; a released shard is 3 GB and
more. Here a tensor is read by rows into memory of its own, and a file is laid out first and filled
row by row in any order, so what is in memory is what is being worked on. A header can be taken over
byte for byte. The format: 8 bytes of length, a JSON header, the tensors back to back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from consilience.conf.errors import CheckpointError
from consilience.model.digest import tensor_bytes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# In the order in which safetensors lays tensors out, widest first, so that each begins aligned.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file: its type, its shape and where its bytes begin."""

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one step along the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def read_folder(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by its stored name: headers only, all of them checked.

    With an index exactly the tensors it lists; without one those of `model.safetensors`.
    CheckpointError names file and tensor: a shard that is missing, truncated or no safetensors file, a
    tensor that the index promises and the shard lacks, or the other way round.
    """
    folder = Path(folder)
    if not (folder / INDEX).is_file() and (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    weight_map = read_index(folder / INDEX)
    found: dict[str, Stored] = {}
    for file_name in sorted(set(weight_map.values())):
        promised = {name for name, file in weight_map.items() if file == file_name}
        held = read_header(folder / file_name)
        for name in sorted(promised ^ held.keys()):
            problem = "is missing" if name in promised else f"is not listed for it in {INDEX}"
            raise CheckpointError(
                f"{folder / file_name}: tensor {name} {problem}; restore or remake the checkpoint"
            )
        found |= held
    return found


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> shard. CheckpointError if the index cannot be read or points out of its folder."""
    try:
        weight_map = json.loads(path.read_text("utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise ValueError("weight_map is not a table of file names")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing; the folder is no checkpoint or not a complete one"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore or remake the checkpoint") from error
    outside = [file for file in sorted(set(weight_map.values())) if Path(file).name != file]
    if outside:
        raise CheckpointError(
            f"{path}: shard {outside[0]} lies outside the checkpoint folder; it is not used"
        )
    return weight_map


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. CheckpointError if it is missing or truncated, or its header is wrong."""
    header = header_bytes(path)
    begin = end = 8 + len(header)
    found: dict[str, Stored] = {}
    try:
        table = json.loads(header)
        table.pop("__metadata__", None)
        for name, row in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
            first, last = row["data_offsets"]
            if row["dtype"] not in DTYPES:
                raise ValueError(f"tensor {name} is of type {row['dtype']}, known are {', '.join(DTYPES)}")
            stored = Stored(path, name, DTYPES[row["dtype"]], tuple(row["shape"]), begin + first)
            if stored.begin != end or last - first != stored.num_bytes:
                raise ValueError(
                    f"tensor {name} fills bytes {first} to {last}, {row['dtype']} {row['shape']} takes "
                    f"{stored.num_bytes} from {end - begin}"
                )
            found[name] = stored
            end = begin + last
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); it is damaged, restore or remake it"
        ) from error
    size = path.stat().st_size
    if size != end:
        what = "truncated" if size < end else "damaged"
        raise CheckpointError(
            f"{path} cannot be read as safetensors: it has {size} bytes, its header promises {end}; "
            f"it is {what}, restore or remake it"
        )
    return found


def header_bytes(path: Path) -> bytes:
    """The JSON header of a file as it lies there. CheckpointError if there is none."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length <= MAX_HEADER_BYTES else b""
        if len(header) != length or not isinstance(json.loads(header), dict):
            raise ValueError(f"a header of {length} bytes was promised")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing; the checkpoint is not complete, restore or remake it"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({error}); it is truncated or damaged, "
            "restore or remake it"
        ) from error
    return header


def read_rows(stored: Stored, first: int = 0, last: int | None = None) -> Tensor:
    """Rows first to last (all of them without) of a stored tensor, in memory of their own.

    CheckpointError if the file is shorter than when its header was checked.
    """
    last = stored.shape[0] if last is None and stored.shape else last
    num_rows = last - first if last is not None else 1
    raw = torch.empty(num_rows * stored.row_bytes, dtype=torch.uint8, device="cpu")
    _read(stored, first * stored.row_bytes, raw)
    shape = (num_rows, *stored.shape[1:]) if stored.shape else ()
    return raw.view(stored.dtype).view(shape)


def read_into(target: Tensor, stored: Stored) -> None:
    """Read a stored tensor into one of its type and shape, contiguous and on the CPU: nothing beside it.

    CheckpointError as `read_rows`.
    """
    _read(stored, 0, target.detach().view(-1).view(torch.uint8))


def _read(stored: Stored, begin: int, raw: Tensor) -> None:
    """Fill the bytes `raw` from byte `begin` of the tensor on."""
    view = memoryview(raw.numpy()).cast("B")  # type: ignore[arg-type]
    with open(stored.file, "rb", buffering=0) as file:
        file.seek(stored.begin + begin)
        done = 0
        while done < len(view):
            got = file.readinto(view[done:])
            if not got:
                raise CheckpointError(
                    f"{stored.file}: tensor {stored.name} ends early; the file changed meanwhile"
                )
            done += got


class ShardWriter:
    """Files of a folder, laid out at once and filled by rows. `close` says whether all was filled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weight_map: dict[str, str] = {}
        self.total_bytes = 0
        self._stored: dict[str, Stored] = {}
        self._left: dict[str, int] = {}

    def lay_out(self, file_name: str, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
        """A file for these tensors, in the order and with the header that safetensors gives them."""
        order = sorted(tensors, key=lambda name: (list(DTYPES).index(NAMES[tensors[name][0]]), name))
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in order:
            dtype, shape = tensors[name]
            begin, end = end, end + math.prod(shape) * dtype.itemsize
            table[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        self.take_over(file_name, header + b" " * (-len(header) % 8))

    def take_over(self, file_name: str, header: bytes) -> None:
        """A file with this header, for the tensors it names."""
        path = self.folder / file_name
        begin = 8 + len(header)
        table = json.loads(header)
        table.pop("__metadata__", None)
        end = begin + max((row["data_offsets"][1] for row in table.values()), default=0)
        with open(path, "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(end)
        for name, row in table.items():
            stored = Stored(
                path, name, DTYPES[row["dtype"]], tuple(row["shape"]), begin + row["data_offsets"][0]
            )
            self._stored[name], self._left[name] = stored, stored.num_bytes
            self.weight_map[name] = file_name
            self.total_bytes += stored.num_bytes

    def write_rows(self, name: str, first: int, rows: Tensor) -> None:
        """Rows of a tensor from `first` on, in the type that the file has. ValueError for another.

        A tensor of three axes takes rows of its last one: those of the matrix [E · rows, columns].
        """
        stored = self._stored[name]
        if rows.dtype != stored.dtype or rows.shape[1:] not in (stored.shape[1:], stored.shape[-1:]):
            raise ValueError(
                f"{name} is {stored.dtype} {stored.shape}, found {rows.dtype} {tuple(rows.shape)}"
            )
        data = tensor_bytes(rows)
        with open(stored.file, "r+b", buffering=0) as file:
            file.seek(stored.begin + first * rows.dtype.itemsize * math.prod(rows.shape[1:]))
            done = 0
            while done < len(data):
                done += file.write(data[done:])
        self._left[name] -= len(data)

    def close(self) -> None:
        """CheckpointError unless every byte of every tensor was written exactly once."""
        for name, left in self._left.items():
            if left:
                raise CheckpointError(f"{self._stored[name].file}: tensor {name} has {left} bytes unwritten")
