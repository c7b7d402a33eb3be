"""Who may teach whom, decided from the checkpoint folders before anything is allocated.

Logits of student and teacher are compared entry by entry, and the teacher reads the student's own token
ids. So both need one vocabulary, one tokenizer, the same special tokens and heads with the same rows, and
were to be prompted alike; widths may differ. Logits are rebuilt as state times head, so neither may scale or
cap them behind that. A mismatch would train to something, silently (post-training notes 12, rows 2 and 3).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from consilience.conf.errors import AdmissionError, CheckpointError
from consilience.model.kernels.reverse_kl import reverse_kl
from consilience.rollout.prompts import checkpoint_family
from consilience.teachers.causal_folder import causal_config, is_other_model
from consilience.teachers.heads import head_shape, read_json
from consilience.teachers.teacher import Teacher
from consilience.training.checkpoint import META

NEUTRAL = {
    "logit_scale": 1,
    "logits_scaling": 1,
    "lm_head_multiplier": 1,
    "output_multiplier_scale": 1,
    "final_logit_softcapping": None,
    "logits_soft_cap": None,
    "output_logit_soft_cap": None,
}
"""Keys of config.json by which models change logits behind the head -> the value that changes nothing
(Cohere, Granite, Falcon-H1, Grok, Gemma 2, RecurrentGemma, xLSTM). Others show when a model is loaded."""

SELF_KL_BOUND = 1e-6
"""Nats a token. Equal weights on equal ids differ by fp32 rounding alone, which is far below."""

PROBE_TOKENS, PROBE_STEP = 16, 7


@dataclass(frozen=True)
class Speech:
    """What two models must share to be compared token by token, read from a checkpoint folder.

    vocab_size       of config.json
    head_rows        rows of head.weight in the safetensors header
    tokenizer        sha256 of tokenizer.json, but for padding and truncation (they change no id)
    special_tokens   text -> id, of tokenizer.json's special added tokens
    declared_tokens  `special_tokens` of consilience.json as written there, None if absent; where there is
                     no consilience.json (a released folder) what it would say: every added token
    bos, eos         token ids of config.json
    scales           keys of `NEUTRAL` that are not neutral -> value
    """

    vocab_size: int
    head_rows: int
    tokenizer: str
    special_tokens: dict[str, int]
    declared_tokens: Any
    bos: int | None
    eos: int | None
    scales: dict[str, Any] = field(default_factory=dict)


def read_speech(folder: Path | str) -> Speech:
    """Read only headers and JSON. CheckpointError: a file missing or unreadable, a head without rows."""
    folder = Path(folder)
    config = read_json(folder / "config.json")
    # What a file of another model leaves out has that model's default, which need not be neutral.
    settings = causal_config(folder).get_text_config().to_dict() if is_other_model(folder) else config
    tokenizer = read_json(folder / "tokenizer.json")
    added = tokenizer.get("added_tokens") or []
    if not (
        isinstance(added, list) and all(isinstance(t, dict) and {"content", "id"} <= t.keys() for t in added)
    ):
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: added_tokens is no list of tokens with content and id; restore it"
        )
    has_card = (folder / META).is_file()
    declared = read_json(folder / META).get("special_tokens") if has_card else _ids_of(added)
    shape = head_shape(folder)
    if len(shape) != 2:
        raise CheckpointError(f"{folder}: head.weight has shape {list(shape)}, a head is [V, D]")
    if not isinstance(config.get("vocab_size"), int):
        raise CheckpointError(
            f"{folder / 'config.json'} has vocab_size {config.get('vocab_size')!r}; it must be a number"
        )
    return Speech(
        vocab_size=config["vocab_size"],
        head_rows=shape[0],
        tokenizer=digest_tokenizer(tokenizer),
        special_tokens=_ids_of(token for token in added if token.get("special")),
        declared_tokens=declared,
        bos=config.get("bos_token_id"),
        eos=config.get("eos_token_id"),
        scales={k: v for k in NEUTRAL if (v := settings.get(k)) is not None and v != NEUTRAL[k]},
    )


def read_templates(folder: Path | str) -> dict[str, str]:
    """How a model wants to be prompted, as far as its folder says: kind of template -> what it is.

    "family" of V4's prompts, by the card or the released encoder; "chat_template" of a tokenizer, as a
    sha256. CheckpointError where a file that says so cannot be read.
    """
    folder = Path(folder)
    found: dict[str, str] = {}
    family = read_json(folder / META).get("family") if (folder / META).is_file() else None
    if family is None and (folder / "encoding").is_dir():
        family = checkpoint_family(folder)
    if family is not None:
        found["family"] = str(family)
    config, jinja = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    template = read_json(config).get("chat_template") if config.is_file() else None
    if jinja.is_file():
        template = _read_text(jinja)
    if template is not None:
        found["chat_template"] = hashlib.sha256(json.dumps(template).encode()).hexdigest()
    return found


def digest_tokenizer(tokenizer: dict[str, Any]) -> str:
    """sha256 of the canonical JSON of a tokenizer, without what changes no id (padding, truncation)."""
    content = {key: value for key, value in tokenizer.items() if key not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def admit(student: Path | str, teacher: Path | str, name: str = "teacher") -> None:
    """AdmissionError unless the teacher's checkpoint can teach the student's; lists every difference.

    Also refuses a model whose own head does not have one row for each token of its vocabulary, or whose
    logits are more than state times head.
    CheckpointError when a folder cannot be read.
    """
    ours, theirs = read_speech(student), read_speech(teacher)
    faults = []
    for who, speech in (("student", ours), (f"teacher '{name}'", theirs)):
        if speech.head_rows != speech.vocab_size:
            faults.append(
                f"{who}: head.weight has {speech.head_rows} rows for a vocabulary of {speech.vocab_size}"
            )
        faults += [
            f"{who}: {key} is {value} in config.json, so its logits are not state times head, as they are "
            f"rebuilt here; {NEUTRAL[key]} is allowed"
            for key, value in speech.scales.items()
        ]
    for part in fields(Speech):
        mine, its = getattr(ours, part.name), getattr(theirs, part.name)
        if mine != its:
            faults.append(f"{part.name}: student {_differing(mine, its)}, teacher {_differing(its, mine)}")
    ours, theirs = read_templates(student), read_templates(teacher)
    faults += [  # what only one of the folders says is not known to differ
        f"{kind}: student {ours[kind]}, teacher {theirs[kind]}"
        for kind in ours
        if kind in theirs and ours[kind] != theirs[kind]
    ]
    if faults:
        raise AdmissionError(
            f"teacher '{name}' ({teacher}) cannot teach the student ({student}): {'; '.join(faults)}. "
            "Both must come from one base: same tokenizer.json, same special tokens, same vocabulary"
        )


def self_kl(student: Teacher, teacher: Teacher, token_ids: Sequence[Sequence[int]]) -> float:
    """Mean exact reverse KL in nats a token, over all positions, of two models that should be one.

    `student` and `teacher` come from the same checkpoint through the two paths a run uses; what is left is
    the error of the whole machinery. token_ids [S][T_s]; no tokens give 0.
    """
    positions = [range(len(ids)) for ids in token_ids]
    h_s, h_t = (
        torch.cat([h.float() for h in model.score(token_ids, positions)]) for model in (student, teacher)
    )
    with torch.no_grad():
        out = reverse_kl(h_s, student.head(), h_t, teacher.head(), torch.ones(len(h_s), device=h_s.device))
    return float(out.kl.double().mean()) if out.kl.numel() else 0.0


def check_loaded(teacher: Teacher) -> float:
    """The largest KL of a loaded teacher to itself, through the loss; AdmissionError unless it is 0.

    What no folder tells: weights that are not finite, a head that does not fit the states, logits out of
    range, a kernel that is wrong for this width, type or device.
    """
    head = teacher.head()
    ids = [(PROBE_STEP * i + 1) % head.shape[0] for i in range(PROBE_TOKENS)]
    states = teacher.score([ids], [range(len(ids))])[0].to(head.device)
    if states.shape[-1] != head.shape[1]:
        raise AdmissionError(
            f"teacher '{teacher.name}' has states of width {states.shape[-1]} and a head of {head.shape[1]}; "
            "its logits cannot be rebuilt from them"
        )
    with torch.no_grad():
        out = reverse_kl(states, head, states, head, torch.ones(len(ids), device=head.device))
    value = float(out.kl.abs().max())
    if not value <= SELF_KL_BOUND:
        raise AdmissionError(
            f"teacher '{teacher.name}': its KL to itself is {value:.3g} nats at a token of a probe, at most "
            f"{SELF_KL_BOUND:.3g} is allowed; its weights or what computes the loss are damaged. Nothing was "
            "trained on it"
        )
    return value


def check_self_kl(value: float, bound: float = SELF_KL_BOUND) -> float:
    """The value, or AdmissionError if a model distilled from itself would move."""
    if not abs(value) <= bound:
        raise AdmissionError(
            f"a model's KL to itself is {value:.3g} nats a token, at most {bound:.3g} is allowed: student "
            "and teacher path differ in weights, precision or positions; nothing was trained"
        )
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path} ({error}); the checkpoint is incomplete, restore it"
        ) from error


def _ids_of(tokens: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    return {token["content"]: token["id"] for token in tokens}


def _differing(mine: Any, other: Any) -> str:
    """A value for the message; of two mappings or lists only what the other lacks, at most five entries."""
    if isinstance(mine, dict) and isinstance(other, dict):
        mine = {key: value for key, value in mine.items() if key not in other or other[key] != value}
        rest = len(mine) - 5
        shown = ", ".join(f"{key}={value}" for key, value in list(mine.items())[:5])
        return f"{{{shown}{f', and {rest} more' if rest > 0 else ''}}}"
    text = str(mine)
    return text if len(text) <= 80 else text[:77] + "…"
