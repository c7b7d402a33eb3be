"""A checkpoint folder of another causal model than V4, read without its model: head, digest, what it scales.

Any model of transformers' AutoModelForCausalLM, from its own folder: nothing is looked up anywhere else and
no code of a folder is run. transformers is imported when such a folder is read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from consilience.conf.errors import CheckpointError
from consilience.model.dense import is_dense
from consilience.model.digest import weights_digest
from consilience.model.shards import Stored, read_folder, read_rows
from consilience.training.fsdp_checkpoint import StoredTensors

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FROM_DISK = {"local_files_only": True, "trust_remote_code": False}
OLD_NAMES = ("embed_out.weight", "output.weight")
"""What files of GPT-NeoX and others still call the head, which transformers renames as it reads."""


def is_other_model(folder: Path | str) -> bool:
    """Whether a folder holds another model than V4, by its config.json; False where that cannot be read."""
    try:
        row = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and is_dense(row)


def causal_config(folder: Path | str) -> Any:
    """transformers' configuration, defaults filled in. CheckpointError if it knows no such model."""
    with reading(folder) as transformers:
        config = transformers.AutoConfig.from_pretrained(folder, **FROM_DISK)
    if getattr(config, "quantization_config", None):
        raise CheckpointError(
            f"{folder}: its weights are quantised; of other models than V4 those in "
            f"{', '.join(str(d).removeprefix('torch.') for d in FLOATS)} are read: dequantise it"
        )
    return config


@contextmanager
def reading(folder: Path | str) -> Iterator[Any]:
    """The package transformers; what it raises inside as a CheckpointError that names the folder."""
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(f"{folder}: this model needs transformers; pip install transformers") from error
    transformers.utils.logging.disable_progress_bar()  # the terminal is the run's own
    try:
        yield transformers
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"{folder} cannot be read by transformers ({error})") from error


def find_head(folder: Path | str) -> Stored:
    """Where the folder's files have the head [V, D]; the embedding where the two are tied.

    CheckpointError if the model has no head, if no file has it, or if it is of no floating type.
    """
    folder = Path(folder)
    try:
        config = (folder / "config.json").read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder} has no config.json that can be read ({error})") from error
    names = _head_names(folder, config)
    stored = read_folder(folder)
    found = next((stored[name] for name in names if name in stored), None)
    if found is None:
        raise CheckpointError(
            f"{folder}: no file has its head, looked for as {', '.join(dict.fromkeys(names))}"
        )
    if found.dtype not in FLOATS:
        raise CheckpointError(
            f"{found.file}: {found.name} is of type {found.dtype}, a floating one is needed"
        )
    return found


@functools.cache  # heads are read in a thread beside training, where no model should be built
def _head_names(folder: Path, config: str) -> tuple[str, ...]:
    """What files may call the head of the model that this config.json describes."""
    found = causal_config(folder)
    with reading(folder) as transformers, torch.device("meta"):
        # Another type than the default one would be everybody's default while it is built.
        model = transformers.AutoModelForCausalLM.from_config(found, dtype=torch.float32)
    head = model.get_output_embeddings()
    if head is None:
        raise CheckpointError(f"{folder}: a {type(model).__name__} has no head that makes logits")
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is head.weight]
    return (*names, *(name.removeprefix(f"{model.base_model_prefix}.") for name in names), *OLD_NAMES)


def read_causal_head(folder: Path | str) -> torch.Tensor:
    """The head [V, D] in the type it is stored in, which is the one its model is run in."""
    return read_rows(find_head(folder))


def folder_digest(folder: Path | str) -> str:
    """The weights digest of what the files hold, by the names they have there, a tensor at a time."""
    folder = Path(folder)
    weight_map = {name: stored.file.name for name, stored in read_folder(folder).items()}
    return weights_digest(StoredTensors(folder, weight_map))
