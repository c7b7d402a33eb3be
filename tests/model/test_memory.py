"""Memory is linear in the number of tokens: no floating-point tensor grows with T²."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from memory_meter import MemoryMeter

from consilience.model.config import TINY
from consilience.model.forward_trace import Trace
from consilience.model.initialize import initialize
from consilience.model.kernels.attention_keys import BUFFER
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer

torch.set_num_threads(1)


def test_the_meter_sees_what_lives_and_dies():
    with MemoryMeter() as meter:
        x = torch.zeros(10)
        y = x + 1
        y.mul_(2)
        y = y[2:5]
        assert (meter.largest, meter.alive) == (10, 80)
        del x
        assert (meter.alive, meter.peak) == (40, 80)
        z = (y @ torch.zeros(3, 50)).sum()
        del y, z
    assert (meter.largest, meter.alive) == (150, 0)


def train(model, tokens):
    """Forward with the indexer's losses and backward."""
    trace = Trace(wants_losses=True)
    loss = model(tokens, trace=trace).logsumexp(-1).mean() + sum(trace.indexer_loss)
    loss.backward()
    model.zero_grad()


def warm_up(model, tokens):
    """The same where every query attends to every entry."""
    for layer in model.layers:
        if layer.attn.indexer is not None:
            layer.attn.indexer.sees_all = True
    train(model, tokens)


@torch.no_grad()
def prefill(model, tokens):
    state = DecodeState.allocate(model.config, 1, tokens.shape[1])
    model(tokens, state=state)


@pytest.mark.parametrize(("work", "longest"), [(train, 8192), (warm_up, 4096), (prefill, 8192)])
def test_memory_grows_in_proportion_to_the_tokens(work, longest):
    """Beside the attention's bounded buffer no tensor is larger than the logits, 640 numbers a token."""
    model = initialize(Transformer(replace(TINY, hc_sinkhorn_iters=2)), 0)
    peaks = []
    for length in (longest // 4, longest // 2, longest):
        tokens = torch.randint(model.config.vocab_size, (1, length))
        with MemoryMeter() as meter:
            work(model, tokens)
        peaks.append(meter.peak)
        assert meter.largest <= max(BUFFER, model.config.vocab_size * length)
    # Log-log slope from one length to its double.
    slopes = [math.log2(large / small) for small, large in itertools.pairwise(peaks)]
    assert max(slopes) <= 1.05, (peaks, slopes)
