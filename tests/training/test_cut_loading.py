"""Checkpoints come into a cut model rank by rank, counted in bytes read and held; wrong ones are refused."""

import ctypes
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from consilience.conf.errors import CheckpointError
from consilience.model.config import TINY
from consilience.model.initialize import initialize
from consilience.model.ranks import ALONE
from consilience.model.transformer import Transformer
from consilience.training.checkpoint import META, CheckpointMeta, load_checkpoint, save_checkpoint
from consilience.training.expert_engine import ExpertEngine, divide_like
from consilience.training.forward import hidden_at_loss
from tests.model.peak_memory import peak, start
from tests.rank_processes import on_ranks
from tests.training.test_fsdp_engine import whole
from tests.training.v4_ranks import SETTINGS, copies, packed_rows, v4_model

pytestmark = pytest.mark.row("weights read part by part", "fsdp")

torch.set_num_threads(1)

M_MMAP_THRESHOLD = -3
# 64 MB of experts in 8 blocks, next to nothing beside them.
LARGE = replace(
    TINY,
    vocab_size=64,
    hidden_size=128,
    num_hidden_layers=8,
    compress_ratios=(0,) * 8,
    n_routed_experts=16,
    moe_intermediate_size=320,
)


def saved(folder, model):
    save_checkpoint(folder, model, None, CheckpointMeta("base", 0, 0))
    return folder


def bytes_read():
    """Bytes this process has asked of files so far."""
    lines = dict(line.split(":") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["rchar"])


def loaded(ranks, folders):
    """What the second of two models costs a rank: the first brings in libraries."""
    from consilience.training.cut_loading import model_to_cut
    from consilience.training.fsdp_engine import FsdpEngine

    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # what is freed is counted as free
    for folder in folders:
        before, read = start(), bytes_read()
        model, _ = model_to_cut(folder, ranks)
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        engine = FsdpEngine(model, SETTINGS, ranks=ranks)
        engine.read_weights(folder)
        held = sum(parameter.nbytes for parameter in engine.optimizer.local.values())
        beside = peak() - before - held - engine.optimizer.state_bytes()
        found = {"beside": beside, "held": held, "read": bytes_read() - read}
        ranks.barrier()
    return found, whole(model.state_dict())


@pytest.mark.slow
def test_a_rank_reads_and_holds_its_own_part_of_a_checkpoint(tmp_path):
    large = initialize(Transformer(LARGE), 0)
    folders = [saved(tmp_path / "small", v4_model()), saved(tmp_path / "large", large)]
    first, second = on_ranks(2, loaded, folders, folder=tmp_path)
    num_bytes = sum(p.nbytes for p in large.parameters())
    block = max(sum(p.nbytes for p in layer.parameters()) for layer in large.layers)
    for found, weights in (first, second):
        assert found["held"] < 0.51 * num_bytes
        assert found["beside"] < 0.5 * block < 0.1 * num_bytes, found  # the other rank's part would be 0.5
        expected = copies(large.state_dict())
        assert all((weights[name] == value).all() for name, value in expected.items())
    assert second[0]["read"] < 0.52 * num_bytes
    assert num_bytes < first[0]["read"] < 1.52 * num_bytes  # it has looked at the digest


def with_reference(ranks, folder):
    from torch.distributed.tensor import DTensor

    from consilience.training.cut_loading import cut_reference

    reference = cut_reference(folder, ranks)
    own = sum(isinstance(parameter, DTensor) for parameter in reference.parameters())
    return own, log_probs(reference)


@torch.no_grad()
def log_probs(model):
    at = hidden_at_loss(model, packed_rows())
    return model.head(at.hidden).log_softmax(-1).numpy()


def test_a_cut_reference_says_what_a_whole_one_does_to_the_bit(tmp_path):
    folder = saved(tmp_path / "reference", v4_model())
    expected = log_probs(load_checkpoint(folder)[0])
    for num_cut, found in on_ranks(2, with_reference, folder, folder=tmp_path):
        assert num_cut > 20 and (found == expected).all()


def with_experts_divided(ranks, folders):
    """Of the second of two folders: what a rank reads and holds of it, its digest, what two models say."""
    from consilience.training.cut_loading import model_to_cut

    assert ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    for folder in folders:
        before, num_read = start(), bytes_read()
        model, meta = model_to_cut(folder, ranks, reads_released=True)
        assert all(tensor.is_meta for tensor in model.state_dict().values())
        adamw = replace(SETTINGS, kind="adamw")  # which has no state before its first step
        engine = ExpertEngine(model, adamw, ranks=ranks, expert_ranks=2)
        engine.read_weights(folder)
        held = sum(parameter.nbytes for parameter in model.parameters())
        found = {"beside": peak() - before - held, "held": held, "read": bytes_read() - num_read}
        ranks.barrier()
    reference, _ = model_to_cut(folder, ranks, verify=False, reads_released=True)
    divide_like(reference, engine, folder)
    return found, meta.digest, [log_probs(each) for each in (model, reference)]


@pytest.mark.slow
@pytest.mark.parametrize("is_released", [False, True])
@pytest.mark.row("weights read part by part", "experts over 2 ranks")
def test_a_rank_reads_and_holds_its_own_experts(is_released, tmp_path):
    large = initialize(Transformer(LARGE), 0)
    folders = [saved(tmp_path / "small", v4_model()), saved(tmp_path / "large", large)]
    for folder in folders if is_released else ():
        (folder / META).unlink()
    found = on_ranks(2, with_experts_divided, folders, folder=tmp_path)
    num_bytes = sum(p.nbytes for p in large.parameters())
    dense = sum(p.nbytes for name, p in large.named_parameters() if ".experts." not in name)
    own = dense + (num_bytes - dense) / 2
    expected, digest = log_probs(large), load_checkpoint(folders[1])[1].digest
    for rank, (one, own_digest, said) in enumerate(found):
        assert one["held"] == own and own_digest == digest
        assert one["beside"] < 0.1 * num_bytes, one  # the other rank's experts would be 0.5
        assert own <= one["read"] - num_bytes * (rank == 0) < 1.05 * own, one  # the first looks at the digest
        for each in said:
            np.testing.assert_allclose(each, expected, rtol=0, atol=1e-5)


def refused(ranks, folder):
    from consilience.training.cut_loading import model_to_cut

    with pytest.raises(CheckpointError) as found:
        model_to_cut(folder, ranks)
    return str(found.value)


@pytest.mark.slow
def test_weights_that_were_changed_are_refused_on_all_ranks(tmp_path):
    folder = saved(tmp_path / "changed", v4_model())
    path = next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    first, second = on_ranks(2, refused, folder, folder=tmp_path)
    assert first == second and "the files were changed or damaged" in first


def test_a_checkpoint_of_another_shape_or_with_a_changed_file_is_refused(tmp_path):
    folder = saved(tmp_path / "other", v4_model())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 16}))
    assert "the model of config.json needs" in refused(ALONE, folder)
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json was changed or damaged" in refused(ALONE, folder)


def test_what_was_not_saved_here_comes_whole(tmp_path):
    from consilience.training.cut_loading import model_to_cut

    folder = saved(tmp_path / "released", v4_model())
    (folder / META).unlink()
    model, meta = model_to_cut(folder, ALONE)
    assert meta.stage == "released" and not next(model.parameters()).is_meta
