"""Did new weights arrive in a sampler that is not ours? Log-probabilities of fixed probes say it.

Plain mathematics over probe sequences: no engine. P probes, N scored tokens in all.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from consilience.model.digest import weights_digest

Scores = list[np.ndarray]  # one fp64 row a probe: log-probability of its tokens 1, 2, …
Reference = Callable[[Mapping[str, Tensor], Sequence[Sequence[int]]], Scores]

FOLLOWED = 0.5  # least share of the move that a changed tensor must cause; a stale one causes none
MOVE, MOST_TIMES = (
    0.5,
    64.0,
)  # a change is doubled until the reference moves by so many nats, or so often as large


def tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Digest of each tensor: that of a publication which holds it alone, so name, dtype and shape count."""
    return {name: weights_digest({name: tensor}) for name, tensor in tensors.items()}


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Sampler against reference on the probes, after one update. Log-probabilities in nats.

    version      of the weights
    mean, largest   absolute difference
    correlation  of the N log-probabilities; 1.0 where they do not vary
    moved        mean absolute move of the reference's log-probabilities since the update before: how much an
                 update that did not arrive would have shown; NaN at the first
    """

    version: int
    mean: float
    largest: float
    correlation: float
    moved: float


def compare(version: int, ours: Scores, reference: Scores, before: Scores | None) -> Mismatch:
    """`ours` are the sampler's, `before` the reference's under the weights before (None: there were none)."""
    x, y = np.concatenate(ours), np.concatenate(reference)
    difference = np.abs(x - y)
    moved = float("nan") if before is None else float(np.abs(y - np.concatenate(before)).mean())
    varies = x.std() > 0 and y.std() > 0
    correlation = float(np.corrcoef(x, y)[0, 1]) if varies else 1.0
    return Mismatch(version, float(difference.mean()), float(difference.max()), correlation, moved)


def note_update(path: Path, mismatch: Mismatch, digest: str) -> None:
    """A line of `path` in one write, so that lines of several processes stay whole."""
    moved = None if math.isnan(mismatch.moved) else mismatch.moved
    row = {**asdict(mismatch), "moved": moved, "digest": digest, "pid": os.getpid(), "time_s": time.time()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab", buffering=0) as file:
        file.write(json.dumps(row).encode() + b"\n")


def kinds_of(names: Sequence[str]) -> dict[str, list[str]]:
    """Names by what they are, whatever layer and expert: `layers.*.attn.attn_sink` -> all sinks."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(re.sub(r"(?<=\.)\d+(?=\.)", "*", name), []).append(name)
    return kinds


def changed(
    weights: Mapping[str, Tensor], names: Sequence[str], times: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    """`weights` with `names` made others: by half of their spread, and no less than 0.1, of normal noise; or
    `times` as much of the same.

    Tables of integers stay: they are no weights, and no update changes them.
    """
    generator = torch.Generator().manual_seed(seed)
    new = dict(weights)
    for name in names:
        old = weights[name]
        if old.is_floating_point():
            values = old.float().cpu()
            size = max(
                0.5 * float(values.std(correction=0)), 0.1 * min(1.0, float(values.abs().max()) or 1.0)
            )
            noise = torch.randn(values.shape, generator=generator) * (times * size)
            new[name] = (values + noise).to(old.dtype).to(old.device)
    return new


def changed_enough(
    weights: Mapping[str, Tensor],
    names: Sequence[str],
    reference: Reference,
    probes: Sequence[Sequence[int]],
    before: Scores,
) -> tuple[dict[str, Tensor], Scores]:
    """`changed` weights that move the reference's log-probabilities by `MOVE` nats on average, so that the
    move stands out of the sampler's rounding, or by what `MOST_TIMES` the change does; and their scores."""
    times = 1.0
    while True:  # no limit: doubles to MOST_TIMES
        other = changed(weights, names, times)
        after = reference(other, probes)
        moved = np.abs(np.concatenate(after) - np.concatenate(before)).mean()
        if moved >= MOVE or times >= MOST_TIMES:
            return other, after
        times *= 2


@dataclass(frozen=True, slots=True)
class KindProof:
    """One kind of tensor changed alone.

    expected  mean absolute move of the reference's log-probabilities, in nats
    followed  how much of the reference's move is in the sampler's: 1 where it has the new tensors, 0 where it
              kept the old ones, and near to these where it computes in FP8
    """

    kind: str
    expected: float
    followed: float

    @property
    def is_stale(self) -> bool:
        """The sampler did not follow."""
        return not self.followed >= FOLLOWED


def kind_proof(kind: str, ours: tuple[Scores, Scores], reference: tuple[Scores, Scores]) -> KindProof:
    """From (before, after) of both sides. A systematic difference between the two sides cancels, and what the
    sampler rounds differently, which has no direction, averages out: <x, y> / <y, y> of the moves x and y."""
    x, y = (np.concatenate(after) - np.concatenate(before) for before, after in (ours, reference))
    moved = float(y @ y)
    return KindProof(kind, float(np.abs(y).mean()), float(x @ y) / moved if moved else float("nan"))
