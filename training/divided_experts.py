"""Where the tensors of a model with divided experts lie: one piece an expert, of state one piece a rank.

What lies in a checkpoint does not tell how many ranks there were. Pieces are named by the ranks of the first
group; the same place of another group has the same experts and only reads.

E experts of a layer, e of them on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from consilience.model.checkpoint import check_hash_tables, official_parts
from consilience.model.expert_exchange import Shard
from consilience.model.expert_parallel import load_own, sharded_names
from consilience.model.released_checkpoint import open_checkpoint
from consilience.model.released_loading import Rank
from consilience.model.shards import read_folder, read_rows
from consilience.training.checkpoint import META
from consilience.training.fsdp_checkpoint import as_meta
from consilience.training.sharded_tensors import Piece, Sharded, cut_pieces
from consilience.training.tensor_files import check_tensors


def official_weights(model: nn.Module, split: Mapping[str, Shard]) -> dict[str, Sharded]:
    """Every tensor of the model by its official name, in a checkpoint's order; split is `sharded_names`'."""
    found: dict[str, Sharded] = {}
    for name, tensor in model.state_dict().items():
        shard = split.get(name)
        if shard is None:
            for official, part in official_parts(name, tensor).items():
                shape = tuple(part.shape)
                found[official] = Sharded(part.dtype, shape, cut_pieces(shape, 1), part)
            continue
        shape = tuple(tensor.shape[1:])
        for rank in range(shard.ranks.size):
            for number in Rank(rank, shard.ranks.size).experts(shard.num_experts):
                own = tensor[number - shard.own.start] if number in shard.own else None
                ((official, _),) = official_parts(name, tensor[:1], number).items()
                found[official] = Sharded(tensor.dtype, shape, (Piece(rank, 0, shape[0]),), own)
    return found


def stored_state(
    types: Mapping[str, tuple[torch.dtype, torch.Size]], split: Mapping[str, Shard]
) -> dict[str, Sharded]:
    """Optimiser state as one process has it, without anybody's rows.

    types  name -> type and shape on this rank (`V4Optimizer.state_types`): "adamw.exp_avg.<weight>"
    """
    found: dict[str, Sharded] = {}
    for key, (dtype, own) in types.items():
        shard = split.get(key.split(".", 2)[-1]) if own else None  # a count of steps has no rows
        if shard is None:
            found[key] = Sharded(dtype, tuple(own), cut_pieces(tuple(own), 1), None)
            continue
        ranks = [(r, Rank(r, shard.ranks.size).experts(shard.num_experts)) for r in range(shard.ranks.size)]
        pieces = tuple(Piece(rank, experts.start, experts.stop) for rank, experts in ranks)
        found[key] = Sharded(dtype, (shard.num_experts, *own[1:]), pieces, None)
    return found


@torch.no_grad()
def read_own(folder: Path, model: nn.Module) -> None:
    """What this rank has of a folder's weights, saved here or released: no other expert is read.

    CheckpointError names the tensor, before anything is changed.
    """
    if not (folder / META).is_file():
        return load_own(model, open_checkpoint(folder))  # type: ignore[arg-type]
    stored, weights = read_folder(folder), official_weights(model, sharded_names(model))
    check_tensors(folder, stored, as_meta(weights))
    for name, tensor in weights.items():
        if tensor.local is not None:
            tensor.local.copy_(read_rows(stored[name]))
    check_hash_tables(model)  # type: ignore[arg-type]
