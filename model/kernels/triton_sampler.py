"""Triton kernels of the sampler: one token a row by inverse CDF, with its log-probability.

`tempered` and `draw` in rollout/sampling.py define it. The vocabulary is cut into chunks of a fixed size,
whose sums are fp64 and added in order: a row's token is the same in any company, and the same as the twin's
but where a uniform number falls within rounding of the border between two tokens.

R rows, V vocabulary, N chunks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = {"size": 4096, "num_warps": 8}


@triton.jit
def _chunks(logits, temperature, tops, sums, vocabulary, num_chunks, stride, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0), tl.program_id(1)
    heat = tl.load(temperature + row)
    heat = tl.where(heat > 0, heat, 1.0)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    place = logits + row.to(tl.int64) * stride + token
    x = tl.load(place, mask=token < vocabulary, other=float("-inf")).to(tl.float32) / heat
    top = tl.max(x, 0)
    level = tl.where(top == float("-inf"), 0.0, top)
    tl.store(tops + row * num_chunks + chunk, top)
    tl.store(sums + row * num_chunks + chunk, tl.sum(tl.exp(x - level).to(tl.float64), 0))


@triton.jit
def _draw(
    logits, temperature, uniform, tops, sums, tokens, logprobs, vocabulary, num_chunks, stride,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, chunk = tl.program_id(0), tl.arange(0, BLOCK)
    heat = tl.load(temperature + row)
    is_greedy = heat <= 0
    heat = tl.where(is_greedy, 1.0, heat)
    top = tl.load(tops + row * num_chunks + chunk, mask=chunk < num_chunks, other=float("-inf"))
    highest = tl.max(top, 0)
    share = tl.load(sums + row * num_chunks + chunk, mask=chunk < num_chunks, other=0.0)
    share = share * tl.exp(top - highest).to(tl.float64)
    total, until = tl.sum(share, 0), tl.cumsum(share, 0)
    target = tl.load(uniform + row) * total
    last = tl.max(tl.where(share > 0, chunk, 0), 0)
    mine = tl.minimum(tl.sum((until <= target).to(tl.int32), 0), last)
    mine = tl.where(is_greedy, tl.min(tl.where(top == highest, chunk, BLOCK), 0), mine)
    mine = tl.minimum(mine, num_chunks - 1)
    before = tl.sum(tl.where(chunk < mine, share, 0.0), 0)
    inside = tl.arange(0, CHUNK)
    token = mine * CHUNK + inside
    place = logits + row.to(tl.int64) * stride + token
    x = tl.load(place, mask=token < vocabulary, other=float("-inf")).to(tl.float32) / heat
    p = tl.exp(x - highest).to(tl.float64)
    found = tl.sum((tl.cumsum(p, 0) <= target - before).to(tl.int32), 0)
    found = tl.minimum(found, tl.max(tl.where(p > 0, inside, 0), 0))
    first = tl.min(tl.where((x == tl.max(x, 0)) & (token < vocabulary), inside, CHUNK - 1), 0)
    found = tl.where(is_greedy, first, found)
    chosen = tl.sum(tl.where(inside == found, x, 0.0), 0)
    tl.store(tokens + row, (mine * CHUNK + found).to(tl.int64))
    tl.store(logprobs + row, chosen - highest - tl.log(total.to(tl.float32)))


def sample(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """logits [R, V] of any float type, temperature [R] fp32 (0: greedy), uniform [R] fp64 in [0, 1), all on
    one device -> tokens [R] int64 and their log-probabilities [R] fp32, of temperature 1 where greedy."""
    num_rows, vocabulary = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_chunks = triton.cdiv(vocabulary, CHUNK["size"])
    device = logits.device
    tops = torch.empty(num_rows, num_chunks, dtype=torch.float32, device=device)
    sums = torch.empty(num_rows, num_chunks, dtype=torch.float64, device=device)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs = torch.empty(num_rows, dtype=torch.float32, device=device)
    if num_rows:
        sizes = (vocabulary, num_chunks, logits.stride(0))
        _chunks[(num_rows, num_chunks)](
            logits, temperature, tops, sums, *sizes, CHUNK=CHUNK["size"], num_warps=CHUNK["num_warps"]
        )
        _draw[(num_rows,)](
            logits, temperature, uniform, tops, sums, tokens, logprobs, *sizes,
            CHUNK=CHUNK["size"], BLOCK=triton.next_power_of_2(num_chunks), num_warps=CHUNK["num_warps"],
        )  # fmt: skip
    return tokens, logprobs
