"""Kernels whose rows go to several threads: the same bits as with one, by PyTorch's own OpenMP."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_cases import SCALE, case, packed

from consilience.model.kernels import experts, hyper_connections, index_pick, range_attention
from consilience.model.kernels.compiled import even_parts, fixed_parts
from consilience.model.kernels.norm_rotate import norm_rotate
from consilience.model.layout import chunk_layout
from consilience.model.state import DecodeState

ROOT = Path(__file__).resolve().parents[3]
R = 2100  # rows: several parts, the last of them short


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _norm():
    x, weight = draw(R, 4, 48).requires_grad_(), draw(48, seed=1).requires_grad_()
    turn = torch.polar(torch.ones(R, 1, 8), draw(R, 1, 8, seed=2))
    y = norm_rotate(x, weight, turn, 1e-6)
    return y, *torch.autograd.grad(y, (x, weight), draw(R, 4, 48, seed=3))


def _streams(rounds):
    n, width = 4, 40
    rows = n * (n + 2) if rounds else n
    given = [
        draw(R, n, width),
        draw(rows, n * width, seed=1) * 0.1,
        draw(rows, seed=2),
        draw(3 if rounds else 1, seed=3),
    ]
    own = [given[0].requires_grad_(), *(t.requires_grad_() for t in given[2:])]  # fn's is a matrix library's
    if not rounds:
        read = hyper_connections.collapse(*given, eps=1e-6, norm_eps=1e-6)
        return read, *torch.autograd.grad(read, own, draw(R, width, seed=4))
    read, post, comb = hyper_connections.read(*given, rounds=rounds, eps=1e-6, norm_eps=1e-6)
    written = hyper_connections.write(given[0], read, post, comb)
    return read, post, comb, written, *torch.autograd.grad(written, own, draw(R, n, width, seed=4))


def _attention(config, num_picks):
    layout = packed(config, R // 2)
    query, keys, sink = case(layout, config, 4, num_picks, heads=3, width=32, dtype=torch.float32)
    out = range_attention.forward(query.detach(), keys, sink, SCALE)
    return out, *range_attention.backward(query.detach(), keys, sink, SCALE, out, draw(*out.shape, seed=5))


def _picks():
    given = draw(2, R // 2, 3, 90), draw(2, R // 2, 3, seed=1)
    stop = torch.arange(R // 2).expand(2, -1) % 91
    return (index_pick.pick(*given, torch.zeros_like(stop), stop, 17),)


def _experts():
    hidden, shares = draw(R, 48).requires_grad_(), draw(R, 2, seed=1).requires_grad_()
    choices = torch.rand(R, 5, generator=torch.Generator().manual_seed(2)).argsort(1)[:, :2]
    weights = [
        draw(5, *size, seed=i).requires_grad_() for i, size in enumerate(((40, 48), (48, 40), (40, 48)))
    ]
    shared = [w.detach()[0].requires_grad_() for w in weights]
    out = experts.routed_experts(hidden, shares, choices, 1.5, experts.Expert(*weights))
    out = out + experts.one_expert(hidden, 1.5, experts.Expert(*shared))
    return out, *torch.autograd.grad(out, (hidden, shares, *weights, *shared), draw(R, 48, seed=6))


def _decoding(model, num_rows):
    config = model.config
    state = DecodeState.allocate(config, num_rows, 24)
    for row in range(num_rows):
        state.reserve(row, 24)
    found = []
    with torch.no_grad():
        for step in range(20):
            ids = (torch.arange(num_rows) * 7 + step) % config.vocab_size
            chunk_layout(config, state, 1, None, None)
            found.append(model.head(model.hidden(ids[:, None], state=state)))
    return tuple(found)


@pytest.mark.parametrize(
    "work", ["norm", "streams", "collapse", "ranges", "picked", "picks", "experts", "decoding"]
)
def test_threads_change_no_bit(work, smallest, rough_model):
    config = replace(smallest, sliding_window=4)
    wide = replace(smallest, hidden_size=256, vocab_size=700, moe_intermediate_size=160, q_lora_rank=256)
    model = rough_model(wide).requires_grad_(False) if work == "decoding" else None
    run = {
        "norm": _norm,
        "streams": lambda: _streams(5),
        "collapse": lambda: _streams(0),
        "ranges": lambda: _attention(config, None),
        "picked": lambda: _attention(config, 5),
        "picks": _picks,
        "experts": _experts,
        "decoding": lambda: _decoding(model, 32),
    }[work]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert len(other) == len(found[0])
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(found[0], other))


def test_parts_worked_by_hand():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert [even_parts(rows, 256) for rows in (0, 1, 255, 256, 384, 10_000)] == [1, 1, 1, 2, 3, 3]
    finally:
        torch.set_num_threads(before)
    assert [fixed_parts(rows) for rows in (0, 1023, 1024, 4096, 10**9)] == [1, 1, 2, 8, 8]


def test_threads_are_those_of_pytorch_and_no_second_library_s():
    """One OpenMP library in the process after a kernel ran: another's threads would spin beside PyTorch's."""
    program = (
        "import torch\nfrom consilience.model.kernels.norm_rotate import norm_rotate\n"
        "torch.set_num_threads(2)\nx = torch.randn(4096, 256)\ntorch.mm(x, x.t())\n"
        "norm_rotate(x, None, None, 1e-6)\n"
        "lines = [line.split()[-1] for line in open('/proc/self/maps')]\n"
        "print(len({path for path in lines if 'gomp' in path or 'iomp' in path}))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=110
    )
    assert done.stdout.strip() == "1", (done.stdout, done.stderr[-1000:])


def test_a_compiler_without_openmp_makes_kernels_of_one_thread(tmp_path):
    compiler = tmp_path / "cc-without"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-fopenmp*) exit 1;; esac\nexec cc "$@"\n')
    compiler.chmod(0o755)
    program = (
        "import torch\nfrom consilience.model.kernels.compiled import library\n"
        "from consilience.model.kernels.norm_rotate import norm_rotate\n"
        "torch.set_num_threads(2)\nx = torch.randn(4096, 64)\ny = norm_rotate(x, None, None, 1e-6)\n"
        "assert not isinstance(library('norm_rotate'), str), library('norm_rotate')\n"
        "torch.testing.assert_close(y, x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())\n"
        "print('made')"
    )
    own = {"PYTHONPATH": str(ROOT), "CC": str(compiler), "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, **own},
        timeout=110,
    )
    assert done.stdout.strip() == "made", done.stderr[-1000:]
