"""Index scores and picks by the Triton kernels against the plain indexer; on a GPU, or interpreted.

Half precision is bf16 on a GPU and fp16 interpreted: the interpreter multiplies bf16's bit patterns.
"""

from dataclasses import replace

import pytest
import torch

from consilience.model.indexer import Indexer, IndexQueries
from consilience.model.kernels import gpu_indexer
from consilience.model.layout import packed_layout
from consilience.model.quantization import fake_bf16

pytestmark = pytest.mark.triton
torch.set_num_threads(1)


@pytest.fixture(params=["fp32", "half"])
def dtype(request, triton_device):
    if request.param == "fp32":
        return torch.float32
    return torch.bfloat16 if triton_device == "cuda" else torch.float16


def packed(config, length=34):
    """A row of one sample, a row of two with padding behind: 34 tokens each, 8 and 6 + 1 entries."""
    second = length - 27
    position = torch.stack((torch.arange(length), torch.tensor([*range(24), *range(second), 0, 0, 0])))
    segment = torch.tensor([[0] * length, [0] * 24 + [1] * second + [-1] * 3])
    return packed_layout(config, segment, position, None)


def draw(layout, heads, width, dtype, is_coarse, seed=0):
    """Index queries; of small integers if coarse: many scores are equal, and all sums are exact."""
    g = torch.Generator().manual_seed(seed)
    one = lambda *shape: torch.randint(-1, 2, shape, generator=g).float()
    make = one if is_coarse else lambda *shape: torch.randn(*shape, generator=g)
    rows, length = layout.position.shape
    keys = make(rows, layout.windows[4].num_columns, width).to(dtype)
    return IndexQueries(make(rows, length, heads, width).to(dtype), make(rows, length, heads), keys)


def picks_on(device, index, layout, k):
    windows, place = layout.windows[4], lambda x: x.to(device)
    given = (index.query, index.weight, index.keys, windows.first, windows.stop)
    return gpu_indexer.pick(*map(place, given), k, windows.columns_before, index.is_cut).cpu()


@pytest.mark.parametrize(("heads", "width"), [(3, 4), (16, 32), (20, 24)])
def test_scores_equal_the_plain_ones_wherever_a_query_looks(heads, width, dtype, smallest, triton_device):
    from consilience.model.kernels import triton_index_scores

    layout = packed(smallest)
    index, windows = draw(layout, heads, width, dtype, is_coarse=False), layout.windows[4]
    wide = replace(index, query=index.query.double(), weight=index.weight.double(), keys=index.keys.double())
    wanted = wide.scores(0, 34, windows.num_columns)
    column = torch.arange(windows.num_columns)
    seen = (column >= windows.first[:, :, None]) & (column < windows.stop[:, :, None])
    for row in range(2):
        given = (index.query, index.weight, index.keys, windows.first, windows.stop)
        given = [x[row].contiguous().to(triton_device) for x in given]
        for begin, end in ((0, 34), (13, 29)):
            out = torch.full((end - begin, windows.num_columns), float("nan"), device=triton_device)
            triton_index_scores.scores(*given, begin, out)
            here = seen[row, begin:end]
            found, exact = out.cpu().double()[here], wanted[row, begin:end][here]
            # Sums of `width`, then of `heads` fp32 products; exact products of 16-bit operands.
            torch.testing.assert_close(found, exact, rtol=0, atol=3e-6 * wanted.abs().max().item())


@pytest.mark.parametrize(("k", "block"), [(1, 64), (5, 17)])
def test_picks_are_those_of_the_plain_indexer_ties_included(
    k, block, dtype, smallest, triton_device, monkeypatch
):
    monkeypatch.setattr(gpu_indexer, "BUFFER_BYTES", 1)
    monkeypatch.setattr(gpu_indexer, "MIN_QUERIES", block)
    layout = packed(smallest)
    index = draw(layout, 3, 4, dtype, is_coarse=True)
    wanted = Indexer(replace(smallest, index_topk=k), None).pick(index, layout)
    assert torch.equal(picks_on(triton_device, index, layout, k), wanted)


def test_long_rows_are_shared_by_several_programs(smallest, triton_device, monkeypatch):
    from consilience.model.kernels import triton_index_scores, triton_top_k

    tile = triton_index_scores.Tile(32, 16, 4, 2)
    monkeypatch.setattr(triton_index_scores, "TILES", {2: tile, 4: tile})
    monkeypatch.setattr(triton_top_k, "LAUNCH", triton_top_k.Launch(64, 32))
    position = torch.arange(516)[None]
    layout = packed_layout(smallest, torch.zeros_like(position), position, None)
    index = draw(layout, 2, 4, torch.float32, is_coarse=True)
    last = slice(510, 516)
    windows = layout.windows[4]
    given = (index.query[:, last], index.weight[:, last], index.keys, windows.first[:, last])
    given = [x.to(triton_device) for x in (*given, windows.stop[:, last])]
    wanted = Indexer(replace(smallest, index_topk=20), None).pick(index, layout)
    assert torch.equal(gpu_indexer.pick(*given, 20, lambda _: windows.num_columns).cpu(), wanted[:, last])


def test_cut_scores_are_rounded_to_the_nearest_bf16(smallest, triton_device):
    from consilience.model.kernels import triton_index_scores

    layout = packed(smallest)
    index = draw(layout, 1, 16, torch.float32, is_coarse=False)
    index = replace(index, weight=torch.ones_like(index.weight))
    given = (index.query, index.weight, index.keys, layout.windows[4].first, layout.windows[4].stop)
    given = [x[0].contiguous().to(triton_device) for x in given]
    plain, cut = (torch.zeros(34, 8, device=triton_device) for _ in "ab")
    triton_index_scores.scores(*given, 0, plain)
    triton_index_scores.scores(*given, 0, cut, is_cut=True)
    assert torch.equal(cut, fake_bf16(plain)) and not torch.equal(cut, plain)


def test_the_indexer_takes_the_kernels_where_they_serve(smallest, triton_device, monkeypatch):
    calls, plain = [], gpu_indexer.pick
    layout = packed(smallest)
    index = draw(layout, 3, 4, torch.float32, is_coarse=True)
    module = Indexer(replace(smallest, index_topk=3), None)
    wanted = module.pick(index, layout)
    monkeypatch.setattr(gpu_indexer, "uses_triton", lambda *_: True)
    monkeypatch.setattr(gpu_indexer, "pick", lambda *given: calls.append(1) or plain(*given))
    place = lambda x: x.to(triton_device)
    windows = layout.windows[4]
    windows = replace(windows, first=place(windows.first), stop=place(windows.stop))
    layout = replace(layout, position=place(layout.position), windows={4: windows})
    index = replace(index, query=place(index.query), weight=place(index.weight), keys=place(index.keys))
    assert torch.equal(module.pick(index, layout).cpu(), wanted) and calls == [1]
