"""Kernels reach the last elements of tensors with more than 2³¹ of them: offsets do not wrap at 32 bits.

131,072 tokens have 2³² channels of queries. Under the interpreter such tensors lie in memory that is reserved
but not there until it is touched, amid as much of the same, so that a wrapped offset finds zeros instead of
ending the process; and only the first and last programs of a launch run. What they make of the last token is
what the same kernel makes of that token alone.
"""

import mmap

import pytest
import torch

from consilience.model.kernels.attention_problem import Problem

pytestmark = pytest.mark.triton
torch.set_num_threads(1)

LIMIT = 2**31  # elements
EDGE = {"programs": 32}  # that run at either end of a launch's first axis
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def reserved(shape, dtype):
    """Zeros on the CPU, with as many bytes before them and behind."""
    count = torch.Size(shape).numel()
    place = mmap.mmap(-1, 3 * count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    return torch.frombuffer(place, dtype=dtype)[count : 2 * count].view(shape)


@pytest.fixture
def far(triton_device, monkeypatch):
    """far(shape, dtype): zeros where kernels run."""
    if triton_device == "cuda":
        return lambda *shape, dtype: torch.zeros(shape, dtype=dtype, device="cuda")
    from triton.runtime import interpreter

    builder, executor = interpreter.interpreter_builder, interpreter.GridExecutor
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    monkeypatch.setattr(
        executor, "_restore_args_dev", lambda *_: None
    )  # it copies whole tensors to themselves

    def launcher(self, grid):
        def launch(*given, **named):
            size = (*(grid(named) if callable(grid) else grid), 1, 1)[:3]
            edge = EDGE["programs"]
            ends = [x for x in range(size[0]) if x < edge or x >= size[0] - edge]
            builder.set_grid_dim = lambda *_: set_dim(*size)
            builder.set_grid_idx = lambda x, y, z: set_index(ends[x], y, z)
            try:
                return self.run(*given, grid=(len(ends), *size[1:]), warmup=False, **named)
            finally:
                builder.set_grid_dim, builder.set_grid_idx = set_dim, set_index

        return launch

    def empty_like(x, **settings):
        return reserved(x.shape, x.dtype) if x.numel() >= LIMIT else plain(x, **settings)

    plain = torch.empty_like
    monkeypatch.setattr(interpreter.InterpretedFunction, "__getitem__", launcher)
    monkeypatch.setattr(torch, "empty_like", empty_like)
    return lambda *shape, dtype: reserved(shape, dtype)


def draw(*shape, like):
    g = torch.Generator().manual_seed(7)
    return torch.randn(*shape, generator=g).to(like)


def assert_close(a, b):
    """Both are results of one kernel in 16 bits; tiles may begin elsewhere."""
    assert b.float().abs().max() > 0
    torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2 * b.float().abs().max().item())


def test_norm_and_rotation(far):
    from consilience.model.kernels import triton_norm

    x = far(65600, 64, 512, dtype=torch.float16)
    grad, turn = far(65600, 64, 512, dtype=torch.float16), far(65600, 32, 2, dtype=torch.float32)
    assert x.numel() > LIMIT
    x[-1], grad[-1], turn[-1] = draw(64, 512, like=x), draw(64, 512, like=x).flip(0), draw(32, 2, like=turn)
    last = [t[-1:].clone() for t in (x, turn, grad)]
    assert_close(
        triton_norm.forward(x, None, turn, 1e-6, 1.0)[-1],
        triton_norm.forward(last[0], None, last[1], 1e-6, 1.0)[0],
    )
    assert_close(
        triton_norm.backward(x, None, turn, 1e-6, 1.0, grad)[0][-1],
        triton_norm.backward(last[0], None, last[1], 1e-6, 1.0, last[2])[0][0],
    )


def attention(query, window, entries, picks, oldest):
    """One sliding window of 16 keys, and three entries that the last query sees."""
    tokens, device = query.shape[1], query.device
    stop = torch.zeros(1, tokens, dtype=torch.int64, device=device)
    stop[0, -1] = 3
    sink = torch.zeros(64, device=device)
    place = (oldest, torch.zeros_like(stop), stop)
    chosen = None if picks is None else picks.to(device)
    offset = window.shape[1] - tokens
    return Problem(query, window, entries, chosen, *place, sink, 0.04, offset, 16)


@pytest.mark.parametrize("mode", ["range", "mask", "gather"])
def test_attention_with_the_gradients_of_queries_and_entries(mode, far, monkeypatch):
    from consilience.model.kernels import triton_attention, triton_attention_backward
    from consilience.model.kernels.triton_attention_keys import KeyGradient

    monkeypatch.setitem(EDGE, "programs", 2)  # a query each, or half of its channels
    tokens = 65600
    query, grad = (far(1, tokens, 64, 512, dtype=torch.float16) for _ in range(2))
    query[0, -1], grad[0, -1] = draw(64, 512, like=query), draw(64, 512, like=query).flip(0)
    window = far(1, tokens, 512, dtype=torch.float16)
    window[0, -16:] = draw(16, 512, like=window)
    entries = draw(1, 3, 512, like=window)
    picks = {"mask": torch.tensor([1, 0, 1], dtype=torch.uint8), "gather": torch.tensor([0, 2])}.get(mode)
    oldest = (torch.arange(tokens, device=query.device) - 15).clamp(min=0)[None]
    every = None
    if picks is not None:
        every = torch.full((1, tokens, len(picks)), 0 if mode == "mask" else -1, dtype=picks.dtype)
        every[0, -1] = picks
    whole = attention(query, window, entries, every, oldest)
    alone = attention(
        query[:, -1:].clone(),
        window[:, -16:].clone(),
        entries,
        None if picks is None else picks.view(1, 1, -1),
        torch.zeros_like(oldest[:, :1]),
    )
    found = []
    for problem, upstream in ((whole, grad), (alone, grad[:, -1:].clone())):
        length = problem.query.shape[1]
        out, denominator = triton_attention.forward(problem)
        d_query, d_sink = torch.empty_like(problem.query), torch.empty_like(denominator)
        given = (problem, (out, denominator), upstream, d_sink)
        weights = triton_attention_backward._weigh(*given, 0, length)
        triton_attention_backward._sum_query(problem, weights, d_query, 0, length)
        keys, far_weights = KeyGradient(problem, is_far=True, num_queries=length), weights[1]
        if mode == "gather":
            keys.add_rows(far_weights, upstream, 0, length)
        else:
            keys.add_range(far_weights, upstream, 0, length)
        found.append((out[0, -1], d_query[0, -1], keys.total()))
    for a, b in zip(*found):
        assert_close(a, b)


@pytest.mark.timeout(400)
def test_hyper_connections(far, monkeypatch):
    from consilience.model.kernels import triton_hyper_connections as forward
    from consilience.model.kernels import triton_hyper_connections_backward as backward
    from consilience.model.kernels import triton_hyper_connections_logits as logits

    monkeypatch.setitem(EDGE, "programs", 16)  # the splits of a block of tokens
    tokens, width = 131200, 4096
    streams, upstream = (far(tokens, 4, width, dtype=torch.bfloat16) for _ in range(2))
    output = far(tokens, width, dtype=torch.bfloat16)
    post, comb = far(tokens, 4, dtype=torch.float32), far(tokens, 4, 4, dtype=torch.float32)
    for x in (streams, upstream, output, post, comb):
        x[-1] = draw(*x.shape[1:], like=x)
    assert streams.numel() > LIMIT
    last = [x[-1:].clone() for x in (streams, output, post, comb, upstream)]
    fn, base, scale = (draw(*shape, like=post) for shape in ((24, 4 * width), (24,), (3,)))
    found = []
    for x, added, each, mixed, above in ((streams, output, post, comb, upstream), last):
        written, partial, squares = forward.write_project(x, added, each, mixed, fn)
        pre, *_, mixes, _ = forward.coefficients(partial, squares, width, base, scale, 2, 1e-6, 1e-6)
        d = backward.d_streams(x, (added, each, mixed, above), None)
        read = forward.apply(written, pre)
        of_pre = logits.d_logits(written, read, mixes, base, scale, each, mixed, 0, 1e-6)[:, :4]
        found.append([made[-1] for made in (written, read, of_pre, *d[:2])])
    for a, b in zip(*found):
        assert_close(a, b)


def test_rows_of_experts(far):
    from consilience.model.kernels import triton_moe

    tokens, width = 87400, 4096
    source = far(tokens, width, dtype=torch.float16)
    source[-1] = draw(width, like=source)
    inverse = torch.arange(tokens * 6, dtype=torch.int32, device=source.device).view(tokens, 6)
    rows = far(tokens * 6, width, dtype=torch.float16)
    assert rows.numel() > LIMIT
    out = torch.Tensor.new_empty
    try:  # the result is made by new_empty, which knows no reserved memory
        torch.Tensor.new_empty = lambda x, *shape, **settings: (
            rows if shape == rows.shape else out(x, *shape, **settings)
        )
        triton_moe.expand(source, inverse)
    finally:
        torch.Tensor.new_empty = out
    assert torch.equal(rows[-1], source[-1]) and torch.equal(rows[-6], source[-1])
    torch.testing.assert_close(triton_moe.combine(rows, inverse)[-1], 6 * source[-1], rtol=1e-3, atol=0)

    gate, up = (far(1048640, 2048, dtype=torch.float16) for _ in range(2))
    gate[-1], up[-1] = draw(2048, like=gate), draw(2048, like=gate).flip(0)
    assert gate.numel() > LIMIT
    assert_close(
        triton_moe.swiglu_forward(gate, up, 10.0)[-1],
        triton_moe.swiglu_forward(gate[-1:].clone(), up[-1:].clone(), 10.0)[0],
    )


def test_index_scores(far):
    from consilience.model.kernels import triton_index_scores

    tokens, columns = 262200, 64
    query, weight = far(tokens, 64, 128, dtype=torch.float16), far(tokens, 64, dtype=torch.float32)
    query[-1], weight[-1] = draw(64, 128, like=query), draw(64, like=weight)
    assert query.numel() > LIMIT
    keys = draw(columns, 128, like=query)
    bounds = far(tokens, dtype=torch.int64), torch.full((tokens,), columns, device=keys.device)
    out = torch.zeros(4, columns, device=keys.device)
    triton_index_scores.scores(query, weight, keys, *bounds, tokens - 4, out)
    wanted = (keys.float() @ query[-1].float().t()).relu() @ weight[-1]
    assert_close(out[-1], wanted)
