"""The reverse KL's rows in Triton against `kl_rows` in fp64; on a GPU, or interpreted."""

import pytest
import torch

from consilience.model.kernels import kl_rows, reverse_kl
from consilience.model.kernels.reverse_kl import TeacherRows, reverse_kl_by_teacher, reverse_kl_dense

pytestmark = pytest.mark.triton
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    from consilience.model.kernels import triton_kl_rows

    monkeypatch.setattr(triton_kl_rows, "LAUNCH", {"BLOCK": 1024, "num_warps": 4})


def logits(rows, V, device, apart=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    z_s = torch.randn(rows, V, generator=g) * 3
    z_t = z_s + apart * torch.randn(rows, V, generator=g)
    weight = torch.rand(rows, generator=g)
    weight[1::3] = 0
    target = torch.randint(V, (rows,), generator=g)
    return [x.to(device) for x in (z_s, z_t, target, weight)]


def expected_of(z_s, z_t, target, weight):
    z_s, z_t, weight = (x.double().cpu() for x in (z_s, z_t, weight))
    g = torch.empty_like(z_s)
    return kl_rows.row_pass(z_s, z_t, target.cpu(), weight, g, True, None), g


@pytest.mark.parametrize("V", [7, 1024, 5001])
@pytest.mark.parametrize("apart", [1e-2, 1.0])
def test_statistics_and_gradient_are_those_of_the_plain_rows(V, apart, triton_device):
    from consilience.model.kernels import triton_kl_rows

    given = logits(5, V, triton_device, apart)
    g = torch.empty_like(given[0])
    ours = triton_kl_rows.row_pass(*given, g, True, None)
    statistics, expected = expected_of(*given)
    for x, y in zip(kl_rows.summary(ours.double().cpu()), kl_rows.summary(statistics)):
        # A KL is a mean of differences of logits near 10, rounded at 1e-6 when they were made.
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(g.double().cpu(), expected, rtol=0, atol=2e-6 * expected.abs().max().item())


def test_rows_of_two_parts_of_the_vocabulary_meet_in_their_statistics(triton_device):
    from consilience.model.kernels import triton_kl_rows

    z_s, z_t, target, weight = logits(6, 5000, triton_device)
    z_s[0, 10], z_s[0, 4000] = 50.0, 50.0  # a tie across the border
    z_t[0, 4000] = 60.0
    whole = triton_kl_rows.row_pass(z_s, z_t, target, weight, torch.empty_like(z_s), True, None)
    parts = [slice(0, 1777), slice(1777, 5000)]
    found, grads = [], []
    for part in parts:
        local = target - part.start
        local = torch.where((local >= 0) & (local < part.stop - part.start), local, -1)
        a, b = z_s[:, part].contiguous(), z_t[:, part].contiguous()
        one = triton_kl_rows.row_pass(a, b, local, weight, torch.empty_like(a), False, None)
        found.append(one)
    merged = kl_rows.merged(torch.stack(found))
    for x, y in zip(kl_rows.summary(merged), kl_rows.summary(whole)):
        torch.testing.assert_close(x, y, rtol=2e-6, atol=2e-6)
    assert kl_rows.summary(merged)[3][0] == 1
    for part in parts:
        a, b = z_s[:, part].contiguous(), z_t[:, part].contiguous()
        g = torch.empty_like(a)
        triton_kl_rows.row_pass(a, b, target.clamp_max(a.shape[1] - 1), weight, g, True, lambda _: merged)
        grads.append(g)
    expected = expected_of(z_s, z_t, target, weight)[1]
    torch.testing.assert_close(torch.cat(grads, 1).double().cpu(), expected, rtol=0, atol=2e-6)


def test_a_rows_result_does_not_depend_on_its_company(triton_device):
    from consilience.model.kernels import triton_kl_rows

    z_s, z_t, target, weight = logits(9, 5000, triton_device)
    g = torch.empty_like(z_s)
    whole = triton_kl_rows.row_pass(z_s, z_t, target, weight, g, True, None)
    for row in (0, 4, 8):
        only = slice(row, row + 1)
        alone = torch.empty_like(z_s[only])
        one = triton_kl_rows.row_pass(z_s[only], z_t[only], target[only], weight[only], alone, True, None)
        assert torch.equal(one, whole[only]) and torch.equal(alone, g[only])


@pytest.mark.parametrize("chunk", [5, 100])
def test_the_whole_loss_equals_its_plain_twin_for_several_teachers(chunk, triton_device, monkeypatch):
    monkeypatch.setattr(reverse_kl, "uses_triton", lambda *_: True)
    g = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(triton_device)
    hidden, head = draw(11, 16).requires_grad_(), draw(300, 16).requires_grad_()
    teachers = [TeacherRows(draw(4, 8), draw(300, 8)), TeacherRows(draw(7, 24), draw(300, 24))]
    weight, target = draw(11).abs(), torch.arange(11, device=triton_device)
    ours = reverse_kl_by_teacher(hidden, head, iter(teachers), weight, chunk, target_ids=target)
    found = torch.autograd.grad(ours.loss, (hidden, head))
    exact_hidden, exact_head = (x.detach().double().requires_grad_() for x in (hidden, head))
    first = reverse_kl_dense(
        exact_hidden[:4],
        exact_head,
        *(x.double() for x in teachers[0]),
        weight[:4].double(),
        target_ids=target[:4],
    )
    second = reverse_kl_dense(
        exact_hidden[4:],
        exact_head,
        *(x.double() for x in teachers[1]),
        weight[4:].double(),
        target_ids=target[4:],
    )
    expected = torch.autograd.grad(first.loss + second.loss, (exact_hidden, exact_head))
    for x, *parts in zip(ours[1:], first[1:], second[1:]):
        torch.testing.assert_close(x.double(), torch.cat(parts), rtol=1e-5, atol=1e-5)
    for x, y in zip(found, expected):  # fp32 sums of some 300 products near 4
        torch.testing.assert_close(x.double(), y, rtol=0, atol=2e-6 * y.abs().max().item() * 10)


def test_the_heads_gradient_may_be_added_in_place(triton_device, monkeypatch):
    monkeypatch.setattr(reverse_kl, "uses_triton", lambda *_: True)
    g = torch.Generator().manual_seed(4)
    draw = lambda *shape: torch.randn(*shape, generator=g).to(triton_device)
    hidden, head = draw(6, 16).requires_grad_(), draw(40, 16)
    given = (draw(6, 8), draw(40, 8), draw(6).abs(), 4)
    total = torch.ones_like(head)
    reverse_kl.reverse_kl(hidden, head, *given, head_grad=total).loss.backward()
    head.requires_grad_()
    expected = torch.autograd.grad(reverse_kl.reverse_kl(hidden, head, *given).loss, head)[0]
    torch.testing.assert_close(total - 1, expected, rtol=0, atol=1e-5)
    assert hidden.grad is not None and head.grad is None
