"""Checkpoints of the V4 model itself: official names, router biases, hash tables, a released folder."""

import json

import pytest
import torch
from synthetic_release import release_config, release_tensors, write_folder
from torch import nn

from consilience.conf.errors import CheckpointError
from consilience.model.checkpoint import to_official
from consilience.model.config import ModelConfig
from consilience.model.digest import weights_digest
from consilience.model.forward_trace import Trace
from consilience.model.initialize import initialize
from consilience.model.transformer import Transformer
from consilience.training.checkpoint import (
    CheckpointMeta,
    load_checkpoint,
    load_engine_state,
    save_checkpoint,
)
from consilience.training.tensor_files import INDEX
from consilience.training.torch_engine import OptimizerSettings, TorchEngine

torch.set_num_threads(1)

META = CheckpointMeta(stage="sft", seed=3, step=7)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


def tiny_v4(seed):
    config = ModelConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, head_dim=8,
        qk_rope_head_dim=4, q_lora_rank=8, o_groups=2, o_lora_rank=4, sliding_window=8,
        compress_ratios=(0, 4, 8), index_n_heads=2, index_head_dim=8, index_topk=2,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, num_hash_layers=1,
        torch_dtype="float32",
    )  # fmt: skip
    return initialize(Transformer(config), seed)


def train_v4(engine, steps, first=0):
    for step in range(first, first + steps):
        ids = torch.randint(32, (2, 16), generator=torch.Generator().manual_seed(step))
        trace = Trace()

        def loss(model, x, trace=trace):
            logits = model(x[:, :-1], trace=trace)
            return nn.functional.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten()), {}

        engine.forward_backward(loss, ids, {})
        engine.step(expert_load=trace.expert_load)


def test_the_v4_model_round_trips_under_official_names(tmp_path):
    model = tiny_v4(0)
    save_checkpoint(tmp_path / "ckpt", model, None, META, max_shard_bytes=8000)
    names = json.loads((tmp_path / "ckpt" / INDEX).read_text())["weight_map"]
    assert "layers.0.ffn.experts.3.w2.weight" in names and "layers.0.hc_attn_fn" in names
    assert len(set(names.values())) > 2
    found, meta = load_checkpoint(tmp_path / "ckpt")
    assert same(model, found) and found.config == model.config and len(meta.digest) == 64


def test_the_v4_model_resumes_bit_for_bit_with_muon_adamw_and_moved_router_biases(tmp_path):
    settings = OptimizerSettings(lr=0.01)
    straight = TorchEngine(tiny_v4(0), settings)
    train_v4(straight, 4)
    first = TorchEngine(tiny_v4(0), settings)
    train_v4(first, 2)
    save_checkpoint(tmp_path / "ckpt", first.model, None, META, first)
    model, _ = load_checkpoint(tmp_path / "ckpt")
    resumed = TorchEngine(model, settings)
    load_engine_state(tmp_path / "ckpt", resumed)
    train_v4(resumed, 2, first=2)
    assert same(straight.model, resumed.model)
    assert straight.model.layers[1].ffn.gate.bias.any()


def test_a_hash_table_that_points_past_the_experts_is_refused_even_unverified(tmp_path):
    model = tiny_v4(0)
    with torch.no_grad():
        model.layers[0].ffn.gate.tid2eid[3, 1] = 4
    save_checkpoint(tmp_path / "ckpt", model, None, META)
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.gate\.tid2eid: expert ids run .* to 4"):
        load_checkpoint(tmp_path / "ckpt", verify=False)


def test_a_released_folder_is_where_a_stage_may_start(tmp_path):
    tensors = {n: t for n, t in release_tensors(experts="fp8").items() if not n.startswith("mtp.")}
    folder = write_folder(tmp_path / "base", tensors, release_config(experts="fp8"))
    model, meta = load_checkpoint(folder)
    assert (meta.stage, meta.step) == ("released", 0) and meta.digest == weights_digest(to_official(model))
    assert model.embed.weight.dtype == torch.bfloat16 and model.config.expert_dtype is None
    saved = save_checkpoint(tmp_path / "saved", model, None, CheckpointMeta("sft", 0, 1, parent=meta.digest))
    assert saved.digest == meta.digest
    again, _ = load_checkpoint(tmp_path / "saved")
    assert again.config == model.config
