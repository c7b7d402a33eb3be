"""Names of decode states: a chain of keys, one a block of tokens, that begins with all that their numbers
depend on.

    root  = sha256 of (weights digest, configuration, quantization, exact or fast, dtype, machine, build)
    key n = sha256 of (key n - 1, token ids of block n)
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import consilience.model.transformer as model_source
from consilience.model.checkpoint import to_official
from consilience.model.digest import weights_digest
from consilience.model.transformer import Transformer

FORMAT = 1  # raise it where an entry's content changes
_SOURCES = frozenset({".py", ".cpp", ".h", ".cu"})


class PrefixKeys:
    """The keys of one engine's prefixes, under the weights it has.

    build  digest of the code that computes a state; "" = of this tree
    """

    def __init__(self, model: Transformer, exact: bool, build: str = "") -> None:
        self.model, self._exact, self._build = model, exact, build
        self.block = model.config.block_tokens
        self._root = self._digest = ""

    def use_weights(self, digest: str) -> None:
        """The model has the weights of this digest now; "" = unknown, they are digested when first needed."""
        self._root, self._digest = "", digest

    def of_blocks(self, ids: Sequence[int]) -> list[str]:
        """The key of every complete block of `ids`."""
        keys, key = [], self._start()
        for end in range(self.block, len(ids) + 1, self.block):
            key = _key(key, ids[end - self.block : end])
            keys.append(key)
        return keys

    def of_all(self, ids: Sequence[int], blocks: Sequence[str]) -> str:
        """The key of all of `ids`, of which `blocks` are the complete ones."""
        before = blocks[-1] if blocks else self._start()
        return _key(before, ids[len(blocks) * self.block :])

    def _start(self) -> str:
        if not self._root:
            weight, config = self.model.head.weight, self.model.config
            machine = (
                torch.cuda.get_device_name(weight.device)
                if weight.is_cuda
                else torch.backends.cpu.get_cpu_capability()
            )
            row = {
                "format": FORMAT,
                "weights": self._digest or weights_digest(to_official(self.model)),
                "config": config.to_json_dict(),
                "quantization": asdict(self.model.layers[0].attn.quantization),  # type: ignore[union-attr]
                "exact": self._exact,
                "dtype": str(weight.dtype),
                "machine": [machine, torch.__version__],
                "build": self._build or build_digest(),
            }
            self._root = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()
        return self._root


@functools.cache
def build_digest() -> str:
    """sha256 of every source file of the model: another build may round in another way."""
    folder = Path(model_source.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in _SOURCES):
        data = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(data)}\n".encode() + data)
    return digest.hexdigest()


def _key(before: str, ids: Sequence[int]) -> str:
    return hashlib.sha256(bytes.fromhex(before) + np.asarray(ids, "<i4").tobytes()).hexdigest()
