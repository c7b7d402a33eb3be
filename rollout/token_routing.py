"""Which experts each token of a stream visited, as a sampler recorded it: what routing replay trains on.

A token's row belongs to its own pass through the model: the one that reads the token and predicts the next.
Layers whose routing is a hash of the token are left out. A whole row of the largest number that the type
holds (255, or -1 in 16 bits) means that nobody recorded the token in that layer; a token's experts are all
different, so no choice looks like that. 240 bytes a token for V4-Flash, 696 for V4-Pro; 4/3 of it in JSON.

n tokens, L layers with a learned router, K experts a token, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from consilience.rollout.columns import Column, bytes_from, bytes_of, plain_bytes

MISSING = -1


def choice_dtype(num_experts: int, topk: int) -> str:
    """The type that holds a choice and the mark of a missing one: "u1" where it can, else "i2"."""
    return "u1" if num_experts < 256 or (num_experts == 256 and topk > 1) else "i2"


@dataclass(frozen=True, slots=True)
class TokenRouting:
    """layers  numbers of the L layers; topk K; dtype as `choice_dtype`; data [n, L, K] of it, C order, here
    or on disk."""

    layers: tuple[int, ...]
    topk: int
    dtype: str
    data: bytes | Column

    def __post_init__(self) -> None:
        if self.dtype not in ("u1", "i2") or len(self.data) % self.bytes_per_token:
            raise ValueError(
                f"{len(self.data)} bytes of type {self.dtype!r} are no routing of {len(self.layers)} layers "
                f"with {self.topk} experts each; types are u1 and i2"
            )

    @classmethod
    def of(cls, layers: Sequence[int], chosen: np.ndarray) -> TokenRouting:
        """From chosen [n, L, K] uint8 or int16, as recorded."""
        dtype = "u1" if chosen.dtype == np.uint8 else "i2"
        return cls(tuple(layers), chosen.shape[2], dtype, chosen.astype("<" + dtype, order="C").tobytes())

    @property
    def bytes_per_token(self) -> int:
        return len(self.layers) * self.topk * int(self.dtype[1])

    @property
    def num_tokens(self) -> int:
        return len(self.data) // self.bytes_per_token

    def chosen(self) -> np.ndarray:
        """[n, L, K] in the stored type."""
        return np.frombuffer(bytes_of(self.data), "<" + self.dtype).reshape(-1, len(self.layers), self.topk)

    def experts(self) -> np.ndarray:
        """[n, L, K] int16, -1 where nobody recorded."""
        stored = self.chosen()
        found = stored.astype(np.int16)
        if self.dtype == "u1":
            found[(stored == 255).all(-1)] = MISSING
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; the bytes in base64."""
        data = plain_bytes(self.data)
        return {"layers": list(self.layers), "topk": self.topk, "dtype": self.dtype, "data": data}

    @classmethod
    def from_json(cls, row: dict[str, Any], root: Path | None = None) -> TokenRouting:
        """Inverse of `to_json`; references are to files under `root`."""
        return cls(tuple(row["layers"]), row["topk"], row["dtype"], bytes_from(row["data"], root))


def stitched(num_tokens: int, pieces: Sequence[tuple[int, TokenRouting]]) -> TokenRouting | None:
    """One routing of a stream from pieces (number of the token behind its last, routing), later ones on top.

    Tokens that no piece has are missing. None without pieces. ValueError where a piece reaches past the
    stream or is of other layers.
    """
    if not pieces:
        return None
    first = pieces[0][1]
    shape = (num_tokens, len(first.layers), first.topk)
    whole = np.full(shape, 255 if first.dtype == "u1" else MISSING, "<" + first.dtype)
    for end, piece in pieces:
        if (piece.layers, piece.topk, piece.dtype) != (first.layers, first.topk, first.dtype):
            raise ValueError(f"routing of layers {piece.layers} continues one of layers {first.layers}")
        start = end - piece.num_tokens
        if start < 0 or end > num_tokens:
            raise ValueError(f"routing of tokens {start} to {end - 1} in a stream of {num_tokens}")
        whole[start:end] = piece.chosen()
    return TokenRouting.of(first.layers, whole)
