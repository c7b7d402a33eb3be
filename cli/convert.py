"""`consilience convert`: weights from one layout to another, a block at a time, whole or not at all."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from consilience.cli.progress_display import open_progress
from consilience.conf.errors import CheckpointError, ConfigError, ConsilienceError
from consilience.conf.schema import Config, ConvertConfig
from consilience.model.digest import weights_digest
from consilience.model.release import from_checkpoint, write_release
from consilience.model.released_checkpoint import CONFIG, ReleasedCheckpoint, TensorsOnDisk, open_checkpoint
from consilience.rollout.prompts import checkpoint_family
from consilience.rollout.tokenizer import Tokenizer
from consilience.training.checkpoint import META, TOKENIZER, CheckpointMeta, read_meta, seal_folder
from consilience.training.durable_files import flush_folder, folder_beside, is_disk_full, replace_folder

VERB = "convert"
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
OWN = (CONFIG, META)
ENCODING = "encoding"  # DeepSeek's prompt encoder, which tells the two families of checkpoints apart


def convert(cfg: Config) -> int:
    """Write `convert.target`; 0. ConfigError for settings that do not go together or a target that exists."""
    settings = cfg.convert
    source, target = _folders(settings)
    checkpoint = open_checkpoint(source)
    like = None if settings.like is None else open_checkpoint(Path(settings.like))
    _say_what(checkpoint, settings)
    beside = folder_beside(target)
    try:
        _write(beside, checkpoint, like, settings, cfg.log.progress)
        replace_folder(beside, target)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError) and is_disk_full(error):
            raise CheckpointError(f"no room to write {target}; free disk space and convert again") from error
        if isinstance(error, ConsilienceError) or not isinstance(error, OSError):
            raise
        raise CheckpointError(f"{target} could not be written ({error}); nothing was left behind") from error
    print(f"{settings.layout} checkpoint: {target}")
    return 0


def _folders(settings: ConvertConfig) -> tuple[Path, Path]:
    if settings.source is None or settings.target is None:
        raise ConfigError("convert needs two folders: consilience convert source=DIR target=DIR")
    source, target = Path(settings.source), Path(settings.target)
    for key, folder in (("source", source), ("like", Path(settings.like or source))):
        if not (folder / CONFIG).is_file():
            raise ConfigError(f"convert.{key} is '{folder}', but no checkpoint lies there (no {CONFIG})")
    if target.exists():
        raise ConfigError(f"convert.target '{target}' exists; give a folder that does not, or remove it")
    if settings.layout != "official" and settings.experts not in (None, "bf16"):
        raise ConfigError(
            f"convert.experts is {settings.experts}, but layout={settings.layout} quantises nothing; take "
            "layout=official"
        )
    if settings.layout != "official" and settings.like is not None:
        raise ConfigError(f"convert.like keeps scales, but layout={settings.layout} has none; leave it out")
    return source, target


def _say_what(checkpoint: ReleasedCheckpoint, settings: ConvertConfig) -> None:
    experts = checkpoint.config.expert_dtype or "unquantised"
    what = f"{len(checkpoint.entries)} tensors, {checkpoint.layout} layout, {experts} experts"
    print(f"{checkpoint.folder}: {what}")
    stages = sorted({tensor.name.split(".")[1] for tensor in checkpoint.left_out})
    if stages and (checkpoint.layout, settings.layout) != ("official", "official"):
        print(
            f"left out: {len(checkpoint.left_out)} tensors of the prediction stages mtp.{', '.join(stages)}, "
            "which are not V4's MTP block (DSpark)"
        )


def _write(
    beside: Path,
    checkpoint: ReleasedCheckpoint,
    like: ReleasedCheckpoint | None,
    settings: ConvertConfig,
    progress: str,
) -> None:
    with _shown(progress, len(checkpoint.entries)) as on_block:
        write_release(
            beside,
            from_checkpoint(checkpoint),
            layout=settings.layout,
            experts=settings.experts,
            dtype=getattr(torch, settings.dtype),
            like=like,
            max_shard_bytes=settings.max_shard_bytes,
            on_block=on_block,
        )
    copy_companions(checkpoint.folder, beside)
    if settings.layout != "native":
        flush_folder(beside)
        return
    special = dict(Tokenizer.load(beside).special_ids) if (beside / TOKENIZER).is_file() else {}
    digest = weights_digest(TensorsOnDisk(open_checkpoint(beside)))
    meta = CheckpointMeta("released", 0, 0, special, family=_family(checkpoint.folder), digest=digest)
    seal_folder(beside, meta, {path.name for path in beside.glob("*.safetensors")})


def _family(source: Path) -> str | None:
    """Checkpoint family of the prompts: what the source says of itself; None leaves it to `task.family`."""
    if (source / META).is_file():
        return read_meta(source).family
    return checkpoint_family(source) if (source / ENCODING).is_dir() else None


def copy_companions(source: Path, target: Path) -> None:
    """What lies beside the weights: tokenizer, generation settings, encoder, licence."""
    for path in source.iterdir():
        is_ours = (
            path.name in OWN or path.name.startswith(".") or path.name.endswith((*WEIGHTS, ".index.json"))
        )
        if path.is_dir() and path.name == ENCODING:
            shutil.copytree(path, target / path.name)
        elif path.is_file() and not is_ours:
            shutil.copyfile(path, target / path.name)


@contextmanager
def _shown(kind: str, num_tensors: int) -> Iterator[Callable[[str, int, int], None]]:
    """What `write_release` calls after each block: tensors and gigabytes on the display."""
    display, began = open_progress(kind), time.monotonic()
    state, last, written = "failed", "", 0

    def on_block(name: str, num_bytes: int, total_bytes: int) -> None:
        nonlocal last, written
        written += num_bytes
        shown = {"GB": f"{written / 1e9:.3g} of {total_bytes / 1e9:.3g}"}
        display.advance(VERB, int(name != last), shown)
        last = name

    display.plan([VERB])
    display.enter(VERB)
    display.start(VERB, num_tensors, "tensors")
    try:
        yield on_block
        display.finish(VERB)
        state = "done"
    finally:
        display.leave(VERB, state, time.monotonic() - began)
        display.close()
