"""Models whose dense projections compute in FP8: which do, with which values, the same wherever they run."""

from dataclasses import replace

import pytest
import torch

from consilience.model.checkpoint import official_parts
from consilience.model.exact import exact_mode
from consilience.model.linear import StoredLinear, project
from consilience.model.number_formats import decode_fp8, encode_fp8
from consilience.model.quantization import FP4_FP8, FP8, OFF
from consilience.model.recompute import recompute_policy, set_recompute
from consilience.model.release import from_model, write_release
from consilience.model.released_checkpoint import open_checkpoint
from consilience.model.released_loading import load_released
from consilience.model.state import DecodeState
from consilience.model.tensor_names import Kind, kind_of
from consilience.model.transformer import Transformer

torch.set_num_threads(1)

LENGTH = 31
# Inputs and outputs fill more than one block of 128 and end inside the last.
SIZES = {"hidden_size": 136, "q_lora_rank": 132, "moe_intermediate_size": 36, "index_head_dim": 16}


@pytest.fixture
def config(smallest):
    return replace(smallest, **SIZES, num_nextn_predict_layers=1, mtp_compress_ratios=(0,))


def random_ids(config, *shape, seed=7):
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def stored(x, tile):
    """x as the format stores it, by encoding and decoding, in its own type."""
    rows = x.detach().float().reshape(-1, x.shape[-1])
    return decode_fp8(*encode_fp8(rows, tile), torch.float32, tile).view(x.shape).to(x.dtype)


def on_a_state(model, tokens, borders, dtype):
    state = DecodeState.allocate(model.config, len(tokens), LENGTH, dtype=dtype)
    pieces = [model(tokens[:, a:b], state=state) for a, b in zip([0, *borders], borders)]
    return torch.cat(pieces, 1)


def test_the_projections_in_fp8_are_those_that_the_release_stores_in_fp8(config, rough_model):
    model = rough_model(config)
    found = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, StoredLinear)}
    named = {name for name, p in model.named_parameters() for part in official_parts(name, p)
             if kind_of(part) is Kind.FP8}  # fmt: skip
    assert found == named and any("mtp" in name for name in found)


class Oracle(torch.autograd.Function):
    """A projection from what encoding and decoding makes of input, weight and gradient."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return stored(x, (1, 128)) @ stored(weight, (128, 128)).t()

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        turned = [stored(m.flatten(0, -2).t().contiguous(), (1, 128)) for m in (grad, x)]
        return stored(grad, (1, 128)) @ stored(weight, (128, 128)), turned[0] @ turned[1].t()


def test_outputs_and_gradients_are_those_of_stored_weights_inputs_and_gradients(config, rough_model):
    tokens = random_ids(config, 2, LENGTH)
    model, oracle = rough_model(config, dtype=torch.float64), rough_model(config, dtype=torch.float64)
    model.quantize(FP8)
    for name, module in oracle.named_modules():
        if isinstance(module, StoredLinear) and name.endswith("wo_a"):  # multiplies in the model's type
            with torch.no_grad():
                module.weight.copy_(stored(module.weight, (128, 128)))
        elif isinstance(module, StoredLinear):
            module.forward = lambda x, module=module: Oracle.apply(x, module.weight)
    found, expected = model(tokens), oracle(tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weight = torch.randn(found.shape, dtype=found.dtype, generator=torch.Generator().manual_seed(1))
    for each in (found, expected):
        (each * weight).sum().backward()
    for (name, p), q in zip(model.named_parameters(), oracle.parameters()):
        if q.grad is None:
            assert p.grad is None, name
            continue
        assert (p.grad - q.grad).norm() <= 1e-9 * (q.grad.norm() + 1e-6), name
    model.quantize(OFF)
    assert not torch.allclose(found, model(tokens), atol=1e-3)


@pytest.mark.parametrize("setting", ["cheap", "attention", "experts", "block"])
def test_what_a_policy_computes_again_changes_no_bit(setting, config, rough_model):
    tokens, model = random_ids(config, 1, LENGTH), rough_model(config)
    model.quantize(FP8)
    grads = []
    for policy in ("none", setting):
        set_recompute(model, recompute_policy(policy))
        model.zero_grad()
        model(tokens).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads):
        assert (a is b is None) or torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_exact_mode_a_state_gives_the_bits_of_the_whole_forward(dtype, config, rough_model):
    model = rough_model(config, dtype=dtype)
    model.quantize(FP4_FP8)
    tokens = random_ids(config, 2, LENGTH)
    with torch.no_grad(), exact_mode():
        whole = model(tokens)
        assert torch.equal(on_a_state(model, tokens, list(range(1, LENGTH + 1)), dtype), whole)
        assert torch.equal(on_a_state(model, tokens, [7, 20, LENGTH], dtype), whole)
        assert torch.equal(model(tokens[1:]), whole[1:])


def test_decoding_on_a_state_equals_the_whole_forward(config, rough_model):
    model, tokens = rough_model(config, dtype=torch.float64), random_ids(config, 2, LENGTH)
    model.quantize(FP8)
    with torch.no_grad():
        found = on_a_state(model, tokens, list(range(1, LENGTH + 1)), torch.float64)
        torch.testing.assert_close(found, model(tokens), rtol=0, atol=1e-10)


def test_few_rows_of_a_cpu_step_are_rounded_too(config, rough_model):
    """Without gradients and in fp32, kernels for few rows would take shared experts' weights as they are."""
    model, tokens = rough_model(config), random_ids(config, 2, 3)
    with torch.no_grad():
        plain = model.layers[0].ffn.shared_experts(torch.ones(2, config.hidden_size))
        model.quantize(FP8)
        few = model(tokens)
        assert not torch.equal(model.layers[0].ffn.shared_experts(torch.ones(2, config.hidden_size)), plain)
    torch.testing.assert_close(few, model(tokens).detach(), rtol=0, atol=1e-4)


def test_an_exported_model_computes_the_same_bits_as_its_masters(tmp_path, config, rough_model):
    trainer = Transformer(config, torch.bfloat16)
    trainer.load_state_dict(rough_model(config).state_dict())
    write_release(tmp_path, from_model(trainer), layout="official", experts="fp4")
    rollout = Transformer(config, torch.bfloat16)
    load_released(rollout, open_checkpoint(tmp_path))
    tokens = random_ids(config, 2, LENGTH)
    with torch.no_grad():
        for model in (trainer, rollout):
            model.quantize(FP4_FP8)
        assert not torch.equal(trainer.layers[0].attn.wq_a.weight, rollout.layers[0].attn.wq_a.weight)
        assert torch.equal(trainer(tokens), rollout(tokens))


def test_projections_of_the_same_rows_may_be_asked_for_together(config, rough_model):
    attention, x = rough_model(config).layers[0].attn, torch.randn(3, config.hidden_size)
    for quantization in (OFF, FP8):
        for linear in (attention.wq_a, attention.wkv):
            linear.quantization = quantization
        together = project(x, attention.wq_a, attention.wkv)
        assert all(torch.equal(a, b(x)) for a, b in zip(together, (attention.wq_a, attention.wkv)))
