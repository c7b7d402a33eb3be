"""Micro-batches without loss, for engines whose ranks must all run the same number of forwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from consilience.conf.errors import EngineError
from consilience.training.packing import PackedRows


def blank(micro_batch: Any) -> Any:
    """The micro-batch with its `PackedRows` all padding: same shapes, no token, no loss, nothing counted.

    The rows may lie in a tuple or list beside other things, which stay. EngineError where there are none.
    """
    if isinstance(micro_batch, PackedRows):
        return _blank_rows(micro_batch)
    if isinstance(micro_batch, tuple | list):
        items = [_blank_rows(item) if isinstance(item, PackedRows) else item for item in micro_batch]
        if any(isinstance(item, PackedRows) for item in items):
            return type(micro_batch)(items)
    raise EngineError(
        f"a micro-batch of {type(micro_batch).__name__} cannot be run without loss on a rank that has none "
        "of its own; give packed rows, or as many micro-batches as divide among the ranks"
    )


def _blank_rows(rows: PackedRows) -> PackedRows:
    nowhere = np.full_like(rows.segment_ids, -1)
    return replace(
        rows,
        segment_ids=nowhere,
        position_ids=np.zeros_like(rows.position_ids),
        loss_mask=np.zeros_like(rows.loss_mask),
        sample_index=np.full_like(rows.sample_index, -1),
    )
