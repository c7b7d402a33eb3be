"""A teacher that is any causal model of transformers with the student's vocabulary, by its own forward.

The states are what its head is given: behind the final norm. That logits are those states times the head, and
nothing more, is tried on every model that is loaded.

Shapes: S samples, T tokens of the longest, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from consilience.conf.errors import AdmissionError, CheckpointError, EngineError
from consilience.model.dense import logits_bound
from consilience.teachers.causal_folder import (
    FROM_DISK,
    causal_config,
    find_head,
    folder_digest,
    reading,
)
from consilience.teachers.heads import head_digest
from consilience.teachers.registry import TeacherRecord

NUM_PROBED = 7


class CausalTeacher:
    """`Teacher` over a model of transformers: forward only, frozen, states in the type of its head.

    `digest` is that of its folder. `batch_tokens` bounds the padded tokens of a forward; a longer sample is
    run alone.
    """

    def __init__(self, name: str, model: Any, digest: str, *, batch_tokens: int = 8192) -> None:
        self.name = name
        self.digest = digest
        self.model = model.eval().requires_grad_(False)
        self.head_digest = head_digest(self.head())
        self._batch_tokens = batch_tokens

    @torch.no_grad()
    def score(self, token_ids: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        """[S][T_s], [S][n_s] -> S tensors [n_s, D].

        Samples are padded behind their end, which no causal model looks at. EngineError: a sample longer
        than the model has positions.
        """
        if len(token_ids) != len(positions):
            raise ValueError(f"{len(token_ids)} samples but positions for {len(positions)}")
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest = max((len(ids) for ids in token_ids), default=0)
        if most is not None and longest > most:
            raise EngineError(
                f"teacher '{self.name}' has {most} positions (max_position_embeddings), a sample has "
                f"{longest} tokens; sample shorter ones or take another teacher"
            )
        states: list[Tensor] = []
        for first, last in _batches([len(ids) for ids in token_ids], self._batch_tokens):
            hidden = self._forward(token_ids[first:last])
            for own, wanted in zip(hidden, positions[first:last]):
                states.append(own[torch.tensor(list(wanted), dtype=torch.long, device=own.device)])
        return states

    def head(self) -> Tensor:
        """Prediction head [V, D]."""
        return self.model.get_output_embeddings().weight

    def _forward(self, token_ids: Sequence[Sequence[int]]) -> Tensor:
        """What the head is given [S, T, D]."""
        head = self.head()
        longest = max(len(ids) for ids in token_ids)
        ids = torch.zeros(len(token_ids), longest, dtype=torch.long)
        is_there = torch.zeros_like(ids)
        for row, own in enumerate(token_ids):
            ids[row, : len(own)] = torch.tensor(list(own), dtype=torch.long)
            is_there[row, : len(own)] = 1
        found = self.model.base_model(
            input_ids=ids.to(head.device), attention_mask=is_there.to(head.device), use_cache=False
        )
        return found.last_hidden_state.to(head.dtype)

    @torch.no_grad()
    def check(self) -> None:
        """AdmissionError with the number if its own logits are others than its states times its head."""
        head = self.head()
        kind = type(self.model).__name__
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        if bias is not None and bool(bias.any()):
            raise AdmissionError(
                f"teacher '{self.name}': the head of {kind} has a bias (to {float(bias.abs().max()):.3g}), "
                "so its logits are not state times head, as they are rebuilt here"
            )
        ids = torch.arange(NUM_PROBED, device=head.device)[None] % head.shape[0]
        own = self.model(input_ids=ids, use_cache=False).logits
        wide = torch.promote_types(head.dtype, torch.float32)
        ours = self._forward(ids.tolist()).to(wide) @ head.to(wide).T
        bound = logits_bound(own.dtype, head.shape[1]) * float(ours.abs().max())
        gap = float((own.to(wide) - ours).abs().max())
        if not gap <= bound:
            raise AdmissionError(
                f"teacher '{self.name}': logits of {kind} differ by {gap:.3g} from states times head, "
                f"at most {bound:.3g} is rounding; it scales, caps or shifts them, or its states are no such"
            )


def load_causal_teacher(
    record: TeacherRecord, *, device: torch.device | str = "cpu", batch_tokens: int = 8192
) -> CausalTeacher:
    """A teacher from a folder of safetensors that transformers reads, in the type of its head.

    CheckpointError: what the model has and the files lack, or have in another shape. AdmissionError as
    `CausalTeacher.check`.
    """
    folder = record.checkpoint
    config, dtype = causal_config(folder), find_head(folder).dtype
    with reading(folder) as transformers:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **FROM_DISK
        )
    for what in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, report[what])):
            raise CheckpointError(
                f"{folder}: {what.replace('_', ' ')} {', '.join(names[:5])} ({len(names)} in all); they "
                "would be random, restore or remake the checkpoint"
            )
    teacher = CausalTeacher(record.name, model.to(device), folder_digest(folder), batch_tokens=batch_tokens)
    teacher.check()
    return teacher


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[tuple[int, int]]:
    """[first, last) of neighbouring samples that, padded to the longest, have at most `batch_tokens`."""
    first = longest = 0
    for number, length in enumerate(lengths):
        longest = max(longest, length)
        if number > first and longest * (number + 1 - first) > batch_tokens:
            yield first, number
            first, longest = number, length
    if lengths:
        yield first, len(lengths)
