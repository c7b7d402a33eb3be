"""A teacher that is one of our own models, scored in packed batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from consilience.model.quantization import Quantization
from consilience.model.transformer import Transformer
from consilience.teachers.heads import head_digest
from consilience.teachers.registry import TeacherRecord
from consilience.training.checkpoint import load_checkpoint
from consilience.training.packing import PackedRows, pack, split_micro_batches

QUANTUM = 64


class ModelTeacher:
    """`Teacher` over a `Transformer`: forward only, frozen, states in the model's activation dtype.

    `digest` is that of all weights (of the checkpoint it was read from), `head` the head's, computed if None.
    `row_tokens` is the width samples are packed to (a longer sample widens its batch), `batch_tokens` the
    positions of one forward.
    """

    def __init__(
        self,
        name: str,
        model: Transformer,
        digest: str,
        *,
        head: str | None = None,
        row_tokens: int = 512,
        batch_tokens: int = 8192,
    ) -> None:
        self.name = name
        self.digest = digest
        self.head_digest = head or head_digest(model.head.weight)
        self._model = model.eval().requires_grad_(False)
        self._row_tokens, self._batch_tokens = row_tokens, batch_tokens

    @torch.no_grad()
    def score(self, token_ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        """States after head collapse and final norm: [S][T_s], [S][n_s] -> S tensors [n_s, D].

        Every sample is a segment of its own, so its states do not depend on its neighbours in the row.
        ValueError: a sample without tokens, or lists of different lengths.
        """
        if len(token_ids) != len(positions):
            raise ValueError(f"{len(token_ids)} samples but positions for {len(positions)}")
        if not token_ids:
            return []
        longest = max(len(ids) for ids in token_ids)
        row_tokens = max(self._row_tokens, -(-longest // QUANTUM) * QUANTUM)
        packed = pack(token_ids, quantum=QUANTUM, max_row_tokens=row_tokens)
        states: list[Tensor | None] = [None] * len(token_ids)
        first_row = 0
        for batch in split_micro_batches(packed, max(self._batch_tokens, packed.token_ids.shape[1])):
            hidden = self._forward(batch)
            last_row = first_row + hidden.shape[0]
            for s in range(len(token_ids)):
                if first_row <= packed.rows[s] < last_row:
                    place = torch.tensor(list(positions[s]), dtype=torch.long) + int(packed.starts[s])
                    states[s] = hidden[int(packed.rows[s]) - first_row, place.to(hidden.device)]
            first_row = last_row
        return [state for state in states if state is not None]

    def head(self) -> Tensor:
        """Prediction head [V, D]."""
        return self._model.head.weight

    def _forward(self, batch: PackedRows) -> Tensor:
        """Hidden states [B, T, D] of packed rows."""
        device = self._model.head.weight.device
        ids, segments, places = (
            torch.from_numpy(array.copy()).to(device)
            for array in (batch.token_ids, batch.segment_ids, batch.position_ids)
        )
        return self._model.hidden(ids, segments, places)


def load_model_teacher(
    record: TeacherRecord,
    *,
    device: torch.device | str = "cpu",
    row_tokens: int = 512,
    batch_tokens: int = 8192,
    quantization: str = "off",
) -> ModelTeacher:
    """One teacher from its checkpoint, read now; a run loads them through `host_teachers.py`.

    quantization  "fp4" where the teacher was trained so (`Transformer.quantize`)
    """
    model, meta = load_checkpoint(record.checkpoint)
    transformer = cast(Transformer, model.to(device))
    transformer.quantize(Quantization.from_name(quantization))
    return ModelTeacher(
        record.name, transformer, meta.digest, row_tokens=row_tokens, batch_tokens=batch_tokens
    )
