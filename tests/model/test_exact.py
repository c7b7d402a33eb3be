"""Exact mode: the same token has the same bits in a packed row, in a chunk and in a decode step."""

from dataclasses import replace

import pytest
import torch

from consilience.model import exact
from consilience.model.config import MINI, TINY
from consilience.model.exact import exact_mode, log_softmax, tile_of
from consilience.model.kernels.linear_logprob import linear_logprob
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer

torch.set_num_threads(1)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
CONFIGS = {
    "tiny, top-k chooses": replace(TINY, index_topk=16),
    "tiny, top-k takes all": TINY,
    # Widths that no vector divides, so that every tail of a loop is met.
    "odd widths": replace(
        TINY, vocab_size=643, hidden_size=36, head_dim=18, qk_rope_head_dim=6, q_lora_rank=22, o_lora_rank=10,
        n_routed_experts=5, moe_intermediate_size=22, index_head_dim=10, index_topk=12, hc_mult=3,
    ),
    "mini's widths": replace(
        MINI, num_hidden_layers=3, compress_ratios=(0, 4, 128), num_hash_layers=1, index_topk=16,
        vocab_size=512,
    ),
}  # fmt: skip


def random_ids(config, *shape, seed=7):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [(24, 40), (64, 8), (1000, 33)])
def test_a_row_of_a_product_has_the_same_bits_in_any_company(width, device):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(width[1], width[0], generator=g).to(device)
    row = torch.randn(width[0], generator=g).to(device)
    found = []
    tile = tile_of(weight)
    with exact_mode():
        for size in (1, 2, 7, tile, tile + 1, 3 * tile + 4):
            for place in {0, size // 2, size - 1}:
                x = torch.randn(size, width[0], generator=g).to(device)
                x[place] = row
                found.append(exact.linear(x, weight)[place])
    assert all(torch.equal(y, found[0]) for y in found)
    torch.testing.assert_close(found[0].double(), weight.double() @ row.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_chunks_and_decode_steps_agree_bit_for_bit(name, device, rough_model):
    config = CONFIGS[name]
    model = rough_model(config).requires_grad_(False).to(device)
    ids = random_ids(config, 3, 281).to(device)
    lengths = [150, 77, 281]
    with exact_mode():
        alone = [log_softmax(model(ids[i : i + 1, :n])[0]) for i, n in enumerate(lengths)]
        row = torch.cat([ids[i, :n] for i, n in enumerate(lengths)])[None]
        segments = torch.cat([torch.full((n,), i, device=device) for i, n in enumerate(lengths)])[None]
        packed = log_softmax(model(row, segments)[0]).split(lengths)
        assert all(torch.equal(a, b) for a, b in zip(packed, alone))

        # Rows in another order, one of them twice, prefilled in chunks, then token by token.
        state = DecodeState.allocate(config, 4, 281, device=device)
        order = [2, 0, 2, 1]
        found = [log_softmax(model(ids[order, :61], state=state)[:, -1])]
        model.hidden(ids[order, 61:100], state=state)
        for t in range(100, 149):
            found.append(log_softmax(model(ids[order, t : t + 1], state=state)[:, 0]))
        for place, sample in enumerate(order):
            wanted = log_softmax(model(ids[sample : sample + 1, :149])[0])
            assert torch.equal(found[0][place], wanted[60])
            assert torch.equal(torch.stack([f[place] for f in found[1:]]), wanted[100:149])


def test_the_fast_mode_is_not_exact_which_is_why_there_is_another(rough_model):
    config = CONFIGS["tiny, top-k chooses"]
    model = rough_model(config).requires_grad_(False)
    ids = random_ids(config, 5, 120)
    assert not torch.equal(model(ids)[:1], model(ids[:1]))


@pytest.mark.parametrize("name", CONFIGS)
def test_exact_mode_computes_the_same_model_and_the_same_gradients(name, rough_model):
    config = CONFIGS[name]
    model = rough_model(config, dtype=torch.float64)
    ids = random_ids(config, 2, 150)
    results = []
    for on in (False, True):
        model.zero_grad()
        with exact_mode(on):
            logits = model(ids)
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9 * (1 + theirs.abs().max().item()))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_trainer_s_log_probability_is_the_sampler_s_to_the_last_bit(
    temperature, dtype, device, rough_model
):
    config = CONFIGS["tiny, top-k chooses"]
    model = Transformer(config, dtype).requires_grad_(False)
    model.load_state_dict(rough_model(config).state_dict())
    model.to(device)
    ids = random_ids(config, 3, 70).to(device)
    heat = torch.full((3, 1), temperature, device=device)  # as the sampler has it: a number a row
    with exact_mode():
        hidden = model.hidden(ids)
        trained = linear_logprob(
            hidden[:, 49:-1].flatten(0, 1), model.head.weight, ids[:, 50:].flatten(), temperature=temperature
        )
        state = DecodeState.allocate(config, 3, 70, device=device, dtype=dtype)
        model.hidden(ids[:, :49], state=state)
        sampled = []
        for t in range(49, 69):
            logits = model.head(model.hidden(ids[:, t : t + 1], state=state)[:, 0])
            sampled.append(log_softmax(logits / heat).gather(1, ids[:, t + 1 : t + 2]))
    assert torch.equal(torch.cat(sampled, 1), trained.logprob.view(3, -1))
