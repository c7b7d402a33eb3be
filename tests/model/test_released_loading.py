"""Into a model: the whole of it or a rank's part, from nothing or in place, one block in memory."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from synthetic_release import RELEASED, write_official
from torch import nn

from consilience.conf.errors import CheckpointError
from consilience.model.checkpoint import to_official
from consilience.model.initialize import initialize
from consilience.model.released_checkpoint import open_checkpoint
from consilience.model.released_loading import Part, Rank, load_released
from consilience.model.transformer import Transformer

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return open_checkpoint(write_official(tmp_path_factory.mktemp("official")))


def on_meta(config, dtype):
    with torch.device("meta"):
        return Transformer(config, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_built_on_meta_is_made_and_filled(checkpoint, dtype, device):
    model = on_meta(checkpoint.config, dtype)
    model.embed.weight.requires_grad_(False)
    load_released(model, checkpoint, device=device)
    assert {t.device.type for t in model.state_dict().values()} == {device}
    model.cpu()
    assert not model.embed.weight.requires_grad and model.head.weight.requires_grad
    for name, tensor in to_official(model).items():
        wide = "hc_" in name or name.endswith(("sink", "ape", "bias"))
        assert tensor.dtype == (torch.int64 if "tid2eid" in name else torch.float32 if wide else dtype), name
        assert tensor.equal(checkpoint.read(name, dtype=tensor.dtype)), name
    assert model.mtp[0].e_proj.weight.equal(checkpoint.read("mtp.0.e_proj.weight", dtype=dtype))


def test_a_model_in_memory_is_filled_where_it_lies(checkpoint):
    model = initialize(Transformer(checkpoint.config), 0)
    pointers = {n: p.data_ptr() for n, p in model.named_parameters()}
    load_released(model, checkpoint)
    assert pointers == {n: p.data_ptr() for n, p in model.named_parameters()}
    assert model.layers[2].ffn.experts.w3[1].equal(checkpoint.read("layers.2.ffn.experts.1.w3.weight"))


def test_it_computes(checkpoint):
    model = on_meta(checkpoint.config, torch.float32)
    load_released(model, checkpoint)
    tokens = torch.arange(40)[None] % RELEASED.vocab_size
    assert model(tokens).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vocab_size": 64},
            r"tensor embed.weight: the model has shape \[64, 256\], the checkpoint gives \[48, 256\]",
        ),
        ({"num_hash_layers": 0}, "the checkpoint, .* has no tensor layers.0.ffn.gate.bias"),
        ({"num_nextn_predict_layers": 0, "mtp_compress_ratios": ()}, "the model has no tensor mtp.0"),
        ({"n_routed_experts": 5}, r"no tensor layers.0.ffn.experts.4.w1.weight"),
    ],
)
def test_a_model_of_another_shape_is_refused_and_unchanged(checkpoint, change, message):
    model = initialize(Transformer(replace(checkpoint.config, **change)), 0)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_released(model, checkpoint)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_model_on_meta_stays_there_when_reading_fails(tmp_path):
    folder = write_official(tmp_path / "official")
    checkpoint = open_checkpoint(folder)
    last = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(last, last.stat().st_size - 1)
    model = on_meta(checkpoint.config, torch.float32)
    with pytest.raises(CheckpointError, match="ends early; the file changed meanwhile"):
        load_released(model, checkpoint)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_shares_cover_everything_once_and_end_on_tiles(count):
    for size in (1, 127, 128, 256, 384, 1000, 2048):
        shares = [range(size)[Rank(i, count).share(size)] for i in range(count)]
        assert [n for share in shares for n in share] == list(range(size))
        assert all(share.start % 128 == 0 for share in shares if share)
        experts = [Rank(i, count).experts(size) for i in range(count)]
        assert [n for share in experts for n in share] == list(range(size))
        assert max(map(len, experts)) - min(map(len, experts)) <= 1


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_with_their_own_experts_are_together_the_whole_model(checkpoint, count):
    whole = on_meta(checkpoint.config, torch.bfloat16)
    load_released(whole, checkpoint)
    stacks = {name: [] for name in whole.state_dict() if ".ffn.experts." in name}
    for index in range(count):
        rank = Rank(index, count)
        mine = rank.experts(RELEASED.n_routed_experts)
        model = on_meta(checkpoint.config, torch.bfloat16)
        for block in (*model.layers, *model.mtp):
            for part, stack in list(block.ffn.experts.named_parameters()):
                block.ffn.experts.register_parameter(part, nn.Parameter(stack[: len(mine)]))
        keep = rank.keep_experts(RELEASED.n_routed_experts)
        load_released(model, checkpoint, keep=keep, first_expert=mine.start)
        for name, tensor in model.state_dict().items():
            if name in stacks:
                stacks[name].append(tensor)
            else:
                assert tensor.equal(whole.state_dict()[name]), name
    for name, parts in stacks.items():
        assert torch.cat(parts).equal(whole.state_dict()[name]), name


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("count", [2, 3])
def test_rows_or_columns_of_the_ranks_are_together_the_whole_matrix(checkpoint, axis, count):
    names = [
        "mtp.0.e_proj.weight",
        "layers.1.attn.wo_b.weight",
        "layers.0.ffn.experts.1.w2.weight",
        "head.weight",
    ]
    parts = {name: [] for name in names}
    for index in range(count):
        for name in names:
            shape = checkpoint.entries[name].shape
            share = Rank(index, count).share(shape[axis])
            cut = (share, None) if axis == 0 else (None, share)
            parts[name].append(checkpoint.read(name, *cut))
    for name, pieces in parts.items():
        assert torch.cat(pieces, axis).equal(checkpoint.read(name)), name


def test_a_rank_with_a_part_of_a_matrix_holds_that_part(checkpoint):
    model = on_meta(checkpoint.config, torch.float32)
    model.mtp[0].e_proj.weight = nn.Parameter(torch.empty(256, 128, device="meta"))
    model.layers[1].attn.wo_b.weight = nn.Parameter(torch.empty(128, 128, device="meta"))
    cuts = {
        "mtp.0.e_proj.weight": Part(columns=slice(128, 256)),
        "layers.1.attn.wo_b.weight": Part(rows=slice(128, None)),
    }
    load_released(model, checkpoint, keep=lambda name, shape: cuts.get(name, Part()))
    assert model.mtp[0].e_proj.weight.equal(checkpoint.read("mtp.0.e_proj.weight")[:, 128:])
    assert model.layers[1].attn.wo_b.weight.equal(checkpoint.read("layers.1.attn.wo_b.weight")[128:])


CHILD = """
import json, sys
from pathlib import Path
import torch
from peak_memory import peak, start
torch.set_num_threads(1)
from consilience.model.release import from_checkpoint, from_model, write_release
from consilience.model.released_checkpoint import open_checkpoint
from consilience.model.released_loading import load_released
from consilience.model.transformer import Transformer

small, large, out = map(Path, sys.argv[1:])
found = {}
for name, folder in (("warm", small), ("large", large)):  # the first time brings in libraries
    checkpoint = open_checkpoint(folder)
    for layout in ("official", "native", "transformers"):
        target = out / f"{name}-{layout}"
        target.mkdir(parents=True)
        before = start()
        write_release(target, from_checkpoint(checkpoint), layout=layout)
        found[f"{name} convert {layout}"] = peak() - before
    with torch.device("meta"):
        model = Transformer(checkpoint.config, torch.bfloat16)
    before = start()
    load_released(model, checkpoint)
    held = sum(t.nbytes for t in model.state_dict().values())
    found[f"{name} load"] = peak() - before - held
print(json.dumps(found))
"""


# glibc gives large buffers back at once. Left to itself it raises both thresholds as it goes, and what it
# then keeps (0 to 40 MB, from run to run) would be counted as ours.
PROMPT_FREE = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def test_beside_the_model_one_block_is_in_memory_however_large_shard_and_tensor(tmp_path):
    """Peak resident memory of a process, measured: a shard of 193 MB, tensors of 50 MB, packed 67."""
    config = replace(
        RELEASED, vocab_size=98_304, num_hidden_layers=3, compress_ratios=(0, 4, 128), n_routed_experts=16,
        moe_intermediate_size=4096, num_nextn_predict_layers=0, mtp_compress_ratios=(), q_lora_rank=256,
    )  # fmt: skip
    large = write_official(tmp_path / "large", config, num_shards=1)
    small = write_official(tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(small), str(large), str(tmp_path / "out")],
        env={**os.environ, **PROMPT_FREE, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    beside = {step: size for step, size in json.loads(done.stdout).items() if step.startswith("large")}
    # A block of 2 Mi values is 8 MiB in fp32; decoding and encoding hold four of it at once.
    assert len(beside) == 4 and max(beside.values()) < 40e6, beside
    assert (large / "model.safetensors").stat().st_size > 190e6
