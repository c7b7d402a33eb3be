"""The checkpoint folder: official tensor names, safetensors only, complete or absent.

    config.json                    released field names
    model-00001-of-0000N.safetensors, model.safetensors.index.json
    tokenizer.json                 where the model has one
    consilience.json               CheckpointMeta and the sha256 of every file but the weights
    state/                         optimiser and random state, where training goes on; tensors of the stage

Everything is written into a sibling folder, flushed to the disk and renamed. Whatever stops that
(a full disk, Ctrl-C, a kill), the checkpoint that was there before stays as it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from consilience.conf.errors import CheckpointError, ConsilienceError
from consilience.model.ranks import ALONE, Ranks
from consilience.model.shards import Stored, read_folder, read_index, read_into
from consilience.training.disk import Disk, sha256_of, why_not_written
from consilience.training.durable_files import (
    flush_folder,
    folder_beside,
    restore_folder,
)
from consilience.training.engine import CutEngine, TrainEngine, is_cut
from consilience.training.model_format import ModelFormat, dense_format, format_for, format_of
from consilience.training.tensor_files import (
    INDEX,
    check_tensors,
    index_text,
    read_tensors,
    shards,
)

SCHEMA = 1
META, CONFIG, TOKENIZER, STATE = "consilience.json", "config.json", "tokenizer.json", "state"
STAGE_FILE = "stage.safetensors"
FAMILY = "official"  # of checkpoints that are not a release's, and of all from before they said so


@dataclass(frozen=True, slots=True)
class CheckpointMeta:
    """What a checkpoint is and where it comes from (`consilience.json`).

    stage, seed, step   stage that wrote it, run seed, updates done in that stage
    special_tokens      name -> token id
    domain              domain of a specialist, None for a base or a student
    parent              digest of the weights training started from, None for random weights
    family              checkpoint family of its prompts (v4_model.md 13.3), handed down from the released
                        one that training began with; None: the folder's own encoder says
    digest              of these weights (`model/digest.py`); filled in by `save_checkpoint`
    cursor              JSON-plain place in the data, for the stage that resumes
    files               file -> sha256, all but the weights; filled in by `save_checkpoint`
    """

    stage: str
    seed: int
    step: int
    special_tokens: dict[str, int] = field(default_factory=dict)
    domain: str | None = None
    parent: str | None = None
    family: str | None = FAMILY
    digest: str = ""
    cursor: dict[str, Any] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    tokenizer_path: Path | None,
    meta: CheckpointMeta,
    engine: TrainEngine | None = None,
    *,
    stage_tensors: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = 4 << 30,
    model_format: ModelFormat | None = None,
    disk: Disk | None = None,
) -> CheckpointMeta:
    """Write the checkpoint and return its meta with digest and files filled in.

    stage_tensors  what the stage needs to go on beside engine and cursor, for `read_stage_tensors`
    With an engine on several ranks all of them call this; the first one writes, its meta or error is
    everybody's.
    CheckpointError when the disk is full or cannot be written; an older checkpoint in `folder` is
    then untouched and nothing else is left behind.
    """
    ranks = ALONE if engine is None else engine.ranks
    made: CheckpointMeta | CheckpointError | None = None
    if engine is not None and not ranks.is_first:
        if is_cut(engine):
            _give_pieces(engine, max_shard_bytes)
        elif ranks.broadcast(None):
            engine.save(folder)
    if ranks.is_first:
        try:
            given = (model, tokenizer_path, meta, engine, stage_tensors or {}, max_shard_bytes)
            made = _save(folder, *given, model_format or format_for(model), disk or Disk())
        except CheckpointError as error:
            made = error
    made = ranks.broadcast(made)
    if isinstance(made, CheckpointError):
        raise made
    return made


def _save(
    folder: Path,
    model: nn.Module,
    tokenizer_path: Path | None,
    meta: CheckpointMeta,
    engine: TrainEngine | None,
    own: Mapping[str, Tensor],
    max_shard_bytes: int,
    model_format: ModelFormat,
    disk: Disk,
) -> CheckpointMeta:
    """What the first rank does of `save_checkpoint`."""
    folder = Path(folder)
    beside: Path | None = None
    has_asked, whole = False, _WholeState(engine)
    try:
        restore_folder(folder)
        beside = folder_beside(folder)
        has_asked = True
        given = (model, tokenizer_path, meta, engine, whole, own, max_shard_bytes, model_format, disk)
        meta = _write(beside, *given)
        disk.publish(beside, folder)
    except BaseException as error:
        if is_cut(engine) and not has_asked:
            engine.write_weights(None, max_shard_bytes)
        whole.dismiss()
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, ConsilienceError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(why_not_written(folder, error)) from error
    return meta


def _write(
    beside: Path,
    model: nn.Module,
    tokenizer_path: Path | None,
    meta: CheckpointMeta,
    engine: TrainEngine | None,
    whole: _WholeState,
    stage_tensors: Mapping[str, Tensor],
    max_shard_bytes: int,
    model_format: ModelFormat,
    disk: Disk,
) -> CheckpointMeta:
    """All files of the checkpoint into the folder `beside`, flushed; `consilience.json` last."""
    if is_cut(engine):
        from consilience.training.fsdp_checkpoint import StoredTensors

        weight_map = engine.write_weights(beside, max_shard_bytes) or {}
        engine.save(beside / STATE)
        tensors: Mapping[str, Tensor] = StoredTensors(beside, weight_map)
    else:
        tensors = model_format.to_official(model)
        weight_map = {}
        for file_name, shard in shards(tensors, max_shard_bytes):
            disk.write_tensors(beside / file_name, shard)
            weight_map |= dict.fromkeys(shard, file_name)
    disk.write_text(beside / INDEX, index_text(weight_map, sum(t.nbytes for t in tensors.values())))
    config = model_format.config_dict(model) | {"torch_dtype": main_dtype(tensors)}
    disk.write_text(beside / CONFIG, json.dumps(config, indent=1))
    if tokenizer_path is not None:
        disk.copy(Path(tokenizer_path), beside / TOKENIZER)
    whole.save(beside / STATE)
    if stage_tensors:
        (beside / STATE).mkdir(exist_ok=True)
        disk.write_tensors(beside / STATE / STAGE_FILE, stage_tensors)
    meta = replace(meta, digest=model_format.digest(tensors))
    return seal_folder(beside, meta, set(weight_map.values()), disk)


class _WholeState:
    """State of an engine whose weights every rank has: the first says when all save, or that none do."""

    def __init__(self, engine: TrainEngine | None) -> None:
        self._engine = None if is_cut(engine) else engine

    def save(self, folder: Path) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.ranks.broadcast(True)
            engine.save(folder)

    def dismiss(self) -> None:
        """The others need not wait any more: something failed before the state's turn."""
        if self._engine is not None:
            self._engine.ranks.broadcast(False)


def _give_pieces(engine: CutEngine, max_shard_bytes: int) -> None:
    """What the other ranks do while the first one writes; in the order of `_write`."""
    if engine.write_weights(None, max_shard_bytes) is not None:
        engine.save(None)


def seal_folder(
    folder: Path, meta: CheckpointMeta, shards: Set[str], disk: Disk | None = None
) -> CheckpointMeta:
    """Write `consilience.json` over what lies in a folder, the shards left out, and flush all of it.

    The meta comes back with `files` filled in; its digest is the caller's.
    """
    disk = disk or Disk()
    others = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in shards]
    meta = replace(meta, files={path.relative_to(folder).as_posix(): sha256_of(path) for path in others})
    disk.write_text(folder / META, json.dumps(asdict(meta), indent=1))
    flush_folder(folder, disk.sync)
    return meta


def load_checkpoint(
    folder: Path, *, verify: bool = True, model_format: ModelFormat | None = None
) -> tuple[nn.Module, CheckpointMeta]:
    """The model of a checkpoint folder and its meta.

    The weights keep the type they were written in; no random number is drawn. `verify` recomputes
    the weights digest and the sha256 of the small files. Nothing but the model is in memory, however large
    shards are: all headers are checked first, then each tensor is read into its place, and the digest is
    that of the model as it then is. A folder that was not saved here (no
    `consilience.json`) is read as a released or transformers checkpoint, in the type of its embedding; its
    meta is that of stage "released". CheckpointError names file and tensor.
    """
    folder = Path(folder)
    if model_format is None and (folder / CONFIG).is_file() and not (folder / META).is_file():
        return _load_released(folder)
    meta = read_meta(folder)
    config = read_config(folder)
    model_format = model_format or format_of(config)
    model = _read(folder, config, model_format)
    if verify:
        found = model_format.digest(model_format.to_official(model))
        _check_digest(folder, meta, found)
        verify_files(folder, {n: d for n, d in meta.files.items() if not n.startswith(f"{STATE}/")})
    model_format.check(model)
    return model, meta


def check_weights(folder: Path, meta: CheckpointMeta, ranks: Ranks) -> None:
    """CheckpointError on all ranks unless the weights, read by the first one, have the meta's digest."""
    problem = ranks.first(_problem, folder, meta)
    if problem is not None:
        raise problem


def _problem(folder: Path, meta: CheckpointMeta) -> CheckpointError | None:
    from consilience.model.digest import weights_digest
    from consilience.training.fsdp_checkpoint import StoredTensors

    try:
        _check_digest(folder, meta, weights_digest(StoredTensors(folder, read_index(folder / INDEX))))
    except CheckpointError as error:
        return error
    return None


def _check_digest(folder: Path, meta: CheckpointMeta, found: str) -> None:
    if found != meta.digest:
        raise CheckpointError(
            f"{folder}: the weights have digest {found[:16]}…, {META} says "
            f"{meta.digest[:16] or 'nothing'}…; the files were changed or damaged, "
            "restore or remake the checkpoint"
        )


def _read(folder: Path, config: Mapping[str, Any], model_format: ModelFormat) -> nn.Module:
    """The model with the weights of the folder's shards, in their type. CheckpointError says what fails."""
    stored = read_folder(folder)
    with torch.random.fork_rng(devices=[]):
        model = model_format.build(config, getattr(torch, main_dtype(stored)))
    tensors = model_format.to_official(model)
    check_tensors(folder, stored, tensors)
    for name, tensor in tensors.items():
        read_into(tensor, stored[name])
    return model


def _load_released(folder: Path) -> tuple[nn.Module, CheckpointMeta]:
    """The model of a folder that was not saved here, and a meta that says so."""
    from consilience.model.dense import is_dense
    from consilience.training.released_weights import read_released

    if is_dense(config := read_config(folder)):
        model_format = dense_format()
        model = _read(folder, config, model_format)
        model_format.check(model)
        digest = model_format.digest(model_format.to_official(model))
    else:
        model, digest = read_released(folder)
    return model, CheckpointMeta("released", seed=0, step=0, family=None, digest=digest)


def load_weights(folder: Path, engine: TrainEngine) -> CheckpointMeta:
    """Verified weights of a checkpoint into an engine's model, its own part on each rank; the meta."""
    if not is_cut(engine):
        model, meta = load_checkpoint(folder)
        model_format = format_for(engine.model)
        model_format.load_official(engine.model, model_format.to_official(model))
        return meta
    meta = read_meta(folder)
    check_weights(folder, meta, engine.ranks)
    engine.read_weights(folder)
    return meta


def load_engine_state(folder: Path, engine: TrainEngine) -> None:
    """Optimiser and random state of a checkpoint into an engine over the same model, verified."""
    folder = Path(folder)
    meta = read_meta(folder)
    if not (folder / STATE).is_dir():
        raise CheckpointError(
            f"{folder} has no {STATE}/ folder, so training cannot resume from it; start a stage from its "
            "weights instead, or resume from a checkpoint saved during training"
        )
    verify_files(folder, {name: sha for name, sha in meta.files.items() if name.startswith(f"{STATE}/")})
    engine.load(folder / STATE)


def read_stage_tensors(folder: Path) -> dict[str, Tensor]:
    """The `stage_tensors` of a checkpoint, {} where it was saved without any; verified."""
    name = f"{STATE}/{STAGE_FILE}"
    files = {n: sha for n, sha in read_meta(folder).files.items() if n == name}
    verify_files(Path(folder), files)
    return read_tensors(Path(folder) / name) if files else {}


def read_meta(folder: Path) -> CheckpointMeta:
    """`consilience.json` alone. CheckpointError when the folder is missing or no checkpoint."""
    folder = Path(folder)
    restore_folder(folder)
    if not folder.is_dir():
        near = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        visible = [name for name in near if not name.startswith(".")]
        raise CheckpointError(
            f"no checkpoint at {folder}; there is {', '.join(visible) if visible else 'nothing'} in "
            f"{folder.parent}. Run the stage that makes it or give another path"
        )
    row = _read_json(folder / META)
    if row.get("schema") != SCHEMA:
        raise CheckpointError(f"{folder / META}: schema {row.get('schema')}, this version reads {SCHEMA}")
    try:
        row.setdefault("family", FAMILY)
        return CheckpointMeta(**{f.name: row[f.name] for f in fields(CheckpointMeta)})
    except KeyError as error:
        raise CheckpointError(f"{folder / META}: field {error} is missing; remake the checkpoint") from error


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` alone."""
    return _read_json(Path(folder) / CONFIG)


def verify_files(folder: Path, files: Mapping[str, str]) -> None:
    """CheckpointError if one of the files is missing, or has another sha256 than is given for it."""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the checkpoint is not complete, restore or remake it")
        if sha256_of(path) != expected:
            raise CheckpointError(f"{path} was changed or damaged since it was saved; restore or remake it")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        row = json.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is missing; the folder is no checkpoint or not a complete one"
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); restore or remake the checkpoint") from error
    if not isinstance(row, dict):
        raise CheckpointError(f"{path} holds no table of fields; restore or remake the checkpoint")
    return row


def main_dtype(tensors: Mapping[str, Tensor] | Mapping[str, Stored]) -> str:
    """Type of the embedding: the one config.json calls torch_dtype (others may stay fp32)."""
    for name in ("embed.weight", "model.embed_tokens.weight"):
        if name in tensors:
            return str(tensors[name].dtype).removeprefix("torch.")
    raise CheckpointError(f"{INDEX}: tensor embed.weight is missing; these are not the weights of a V4 model")
