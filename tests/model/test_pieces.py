"""Work in pieces: the values and gradients of undivided work, from less memory."""

from dataclasses import replace

import pytest
import torch
from memory_meter import MemoryMeter

from consilience.model import exact, pieces
from consilience.model.forward_trace import Trace
from consilience.model.pieces import Work, in_pieces, piece_of
from consilience.model.recompute import recompute_policy, set_recompute
from consilience.model.state import DecodeState

torch.set_num_threads(1)


def test_a_piece_is_worked_by_hand():
    """Flash's queries take 64 KiB a token: 2 GiB at 32,768 tokens, 8 at 131,072, cut into pieces of 1 GiB."""
    assert piece_of(32768, 64 * 512 * 2) == 32768
    assert piece_of(131072, 64 * 512 * 2) == 16384
    # 131,072 tokens' 6 experts hold 6 GiB of rows: a sixth is 21,845.3 tokens, 171 times 128 in whole.
    assert piece_of(131072, 6 * 4096 * 2) == 21888
    assert piece_of(1, 3 << 30) == 1 and piece_of(0, 5) == 0


def draw(*shape, dtype=torch.float64):
    g = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def problem(dtype=torch.float64):
    """Rows [2, 7, 3] with shifts [2, 7] int and nothing, a shared table, and a parameter."""
    rows, shared, weight = draw(2, 7, 3, dtype=dtype), draw(4, 3, dtype=dtype), draw(3, 5, dtype=dtype)
    shift = torch.arange(14).view(2, 7) % 4
    starts = []

    def run(start, x, shift, nothing, shared):
        assert nothing is None
        starts.append(start)
        mixed = (x + shared[shift]).sin() * (start + torch.arange(x.shape[1]))[:, None].to(x)
        return mixed @ weight, mixed.square().sum(), torch.tensor(x.shape[1])

    work = Work(run, axis=1, piece=7, name="attention_output", parameters=(weight,))
    return work, (rows, shift, None), (shared,), starts


def gradients(work, rows, shared):
    out, loss, count = in_pieces(work, rows, shared)
    upstream = draw(*out.shape).detach().to(out)
    leaves = (rows[0], *shared, *work.parameters)
    return (out, loss, count, *torch.autograd.grad((out * upstream).sum() + 3 * loss, leaves))


@pytest.mark.parametrize("piece", [1, 3, 6])
def test_values_sums_and_gradients_are_those_of_undivided_work(piece):
    work, rows, shared, starts = problem()
    whole = gradients(work, rows, shared)
    assert starts == [0]  # not run again
    parts = gradients(replace(work, piece=piece), rows, shared)
    assert starts == [0, *range(0, 7, piece), *range(0, 7, piece)]
    for a, b in zip(parts, whole):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)  # fp64 sums of 14 terms


def test_the_bits_repeat_and_nothing_unasked_for_gets_a_gradient():
    work, rows, shared, _ = problem(torch.float32)
    work = replace(work, piece=2)
    first, again = gradients(work, rows, shared), gradients(work, rows, shared)
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    frozen = rows[0].detach()
    out, *_ = in_pieces(work, (frozen, *rows[1:]), (shared[0].detach(),))
    (grad,) = torch.autograd.grad(out.sum(), work.parameters)
    assert frozen.grad is None and grad.abs().sum() > 0


def test_a_result_that_gets_no_gradient_gives_none():
    """Only the summed loss is used: rows of the output are not there to be differentiated."""
    work, rows, shared, _ = problem()
    every = (rows[0], *shared, *work.parameters)
    found = [
        torch.autograd.grad(in_pieces(replace(work, piece=n), rows, shared)[1], every, allow_unused=True)
        for n in (7, 3)
    ]
    assert found[0][2] is None and found[1][2] is None
    for a, b in zip(found[0][:2], found[1][:2]):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_gradients_of_half_precision_are_summed_in_fp32():
    """256 + 1 + … + 1: a sum in bf16 stays at 256, as its neighbours lie 2 apart."""
    weight = torch.ones((), dtype=torch.bfloat16, requires_grad=True)
    rows = torch.ones(65, dtype=torch.bfloat16)
    rows[0] = 256
    work = Work(lambda _, x: (x * weight,), 0, 1, "attention_output", (weight,))
    in_pieces(work, (rows,))[0].sum().backward()
    assert weight.grad.item() == 320 and weight.grad.dtype == torch.bfloat16


def test_work_finds_on_parameters_what_was_put_there():
    """As fused kernels do that add into a parameter's main gradient and give autograd none."""

    class Fused(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, total):
            ctx.save_for_backward(x)
            ctx.total = total
            return x * weight

        @staticmethod
        def backward(ctx, grad):
            ctx.total += (grad * ctx.saved_tensors[0]).sum()
            return grad, None, None

    weight = torch.nn.Parameter(torch.ones(()))
    weight.main_grad = torch.zeros(())
    work = Work(lambda _, x: (Fused.apply(x, weight, weight.main_grad),), 0, 2, "attention_output", (weight,))
    in_pieces(work, (torch.arange(5.0, requires_grad=True),))[0].sum().backward()
    assert weight.grad is None and weight.main_grad == 10


@pytest.mark.parametrize("length", [256, 1024])
def test_no_more_than_a_piece_is_held_beside_arguments_and_results(length):
    def run(_, x):
        wide = x[:, None].expand(-1, 1000, -1).exp()
        return ((wide * wide).sum(1),)

    rows = torch.zeros(length, 2, requires_grad=True)
    with MemoryMeter() as meter:
        in_pieces(Work(run, 0, 64, "attention_output"), (rows,))[0].sum().backward()
    # A piece's exponentials, their squares and both gradients, 512 KB each; the rest has 2 numbers a token.
    assert meter.peak < 5 * 64 * 1000 * 2 * 4 + length * 2 * 4 * 8


# ---- the model ----------------------------------------------------------------------------------


@pytest.fixture
def small_pieces(monkeypatch):
    """Everything that is divided at all goes in pieces of a few tokens."""

    def divide(is_on):
        monkeypatch.setattr(pieces, "WHOLE_BYTES", 4096 if is_on else 1 << 40)
        monkeypatch.setattr(pieces, "PIECE_BYTES", 4096)
        monkeypatch.setattr(pieces, "MULTIPLE", 4)

    return divide


def packed(vocab):
    """Two rows of 60 tokens: samples of 31, 25 and 4 of padding; one sample."""
    ids = torch.randint(vocab, (2, 60), generator=torch.Generator().manual_seed(3))
    segment = torch.zeros(2, 60, dtype=torch.long)
    segment[0, 31:], segment[0, 56:] = 1, -1
    return ids, segment


def run_step(model):
    ids, segment = packed(model.config.vocab_size)
    trace = Trace(wants_losses=True)
    hidden = model.hidden(ids, segment, trace=trace)
    loss = hidden[segment >= 0].square().sum() + trace.summed_indexer_loss() + sum(trace.balance_loss)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    counts = (
        trace.csa_visible,
        trace.csa_dropped,
        trace.hca_attended,
        [int(n) for n in trace.indexer_queries],
    )
    return hidden.detach(), found, counts


@pytest.mark.parametrize(
    "setting", ["none", "block", ("mhc", "attention_inner", "picks", "router"), ("attention", "experts")]
)
def test_the_model_computes_the_same_in_pieces_under_every_policy(setting, rough_model, small_pieces):
    model = rough_model(dtype=torch.float64)
    small_pieces(False)
    hidden, grads, counts = run_step(model)
    small_pieces(True)
    set_recompute(model, recompute_policy(setting))
    again = run_step(model)
    # fp64: what differs is the order of sums over 120 tokens.
    torch.testing.assert_close(again[0], hidden, rtol=1e-11, atol=1e-11)
    assert again[2] == counts and again[1].keys() == grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(again[1][name], grad, rtol=1e-9, atol=1e-10 * grad.abs().max().item())


def test_a_chunk_on_a_decode_state_goes_in_pieces_too(rough_model, small_pieces, smallest):
    model = rough_model(dtype=torch.float64)
    ids, _ = packed(smallest.vocab_size)

    def run():
        state = DecodeState.allocate(smallest, 2, 60, dtype=torch.float64)
        with torch.no_grad():
            first = model.hidden(ids[:, :33], state=state)
            return torch.cat((first, model.hidden(ids[:, 33:], state=state)), 1)

    small_pieces(False)
    whole = run()
    small_pieces(True)
    torch.testing.assert_close(run(), whole, rtol=1e-11, atol=1e-11)


def test_in_exact_mode_pieces_change_no_bit(rough_model, small_pieces):
    model = rough_model()
    found = []
    for is_on in (False, True):
        small_pieces(is_on)
        with exact.exact_mode(), torch.no_grad():
            found.append(model.hidden(*packed(model.config.vocab_size)))
    assert torch.equal(*found)


def test_the_model_s_backward_holds_queries_of_a_piece_only(rough_model, small_pieces, smallest):
    """Per token: 8 heads of 64 channels are 4 KB; undivided, several times that is held."""
    config = replace(smallest, num_attention_heads=8, head_dim=64, compress_ratios=(0,), num_hidden_layers=1)
    model = rough_model(config)
    ids = torch.randint(config.vocab_size, (1, 1024))
    peaks = []
    for is_on in (False, True):
        small_pieces(is_on)
        pieces.PIECE_BYTES = 64 * 8 * 64 * 4
        with MemoryMeter() as meter:
            model.hidden(ids).sum().backward()
        model.zero_grad(set_to_none=True)
        peaks.append(meter.peak)
    queries = 1024 * 8 * 64 * 4
    assert peaks[0] > 4 * queries and peaks[1] < peaks[0] - 3 * queries
