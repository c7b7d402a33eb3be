"""The matrices that one weight stacks in its rows, by its name: each is orthogonalised by itself (12.2)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from consilience.conf.errors import EngineError

LAYER = r"(layers|mtp)\.\d+\."
COMPRESSOR = rf"{LAYER}attn\.(indexer\.)?compressor\."


def row_blocks(name: str, shapes: Mapping[str, tuple[int, ...]], o_groups: int | None) -> tuple[int, ...]:
    """Heights of the independent matrices stacked in the rows of one weight.

    shapes    name -> shape of every parameter;  o_groups  output groups of `wo_a`, None: read off the shapes
    EngineError where the rows do not fall into them.
    """
    rows = shapes[name][-2]
    if name.endswith("attn.wo_a.weight"):
        groups = o_groups or _output_groups(name, shapes)
        return _equal(name, rows, groups)
    if re.fullmatch(rf"{COMPRESSOR}(wkv|wgate)\.weight", name):
        entry_width = shapes.get(re.sub(r"(wkv|wgate)\.weight$", "norm.weight", name), (rows,))[0]
        return _equal(name, rows, max(1, rows // entry_width))  # 2 where windows overlap (CSA), else 1
    if re.search(r"hc_(attn|ffn)[._]fn$", name):
        streams = math.isqrt(rows + 1) - 1
        if streams * (streams + 2) != rows:
            raise EngineError(
                f"{name} has {rows} rows; N streams need N·(N + 2) of them (pre N, post N, comb N·N)"
            )
        return (streams, streams, streams * streams)
    return (rows,)


def _output_groups(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """wq_b makes all heads' channels, wo_a reads one group's: their ratio counts the groups."""
    queries = shapes.get(name.replace("wo_a", "wq_b"))
    if queries is None:
        raise EngineError(f"{name}: the number of output groups is unknown; pass o_groups")
    return max(1, queries[0] // shapes[name][1])


def _equal(name: str, rows: int, parts: int) -> tuple[int, ...]:
    if rows % parts:
        raise EngineError(f"{name} has {rows} rows, which do not fall into {parts} equal blocks")
    return (rows // parts,) * parts
