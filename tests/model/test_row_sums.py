"""Rows that meet in one place: summed in their order, on every device the same on every run."""

import pytest
import torch

from consilience.model.forward_trace import Trace
from consilience.model.row_sums import add_rows_, take_rows

torch.set_num_threads(1)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def drawn(*shape, seed=0, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**options)


@pytest.mark.parametrize("device", DEVICES)
def test_worked_by_hand(device):
    place = torch.tensor([2, 0, 2], device=device)
    source = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], device=device, requires_grad=True)
    taken = take_rows(source, place)
    assert taken.tolist() == [[5, 6], [1, 2], [5, 6]]
    (taken * torch.tensor([[1.0], [10.0], [100.0]], device=device)).sum().backward()
    assert source.grad.tolist() == [[10, 10], [0, 0], [101, 101]]
    target = torch.ones(3, device=device)
    assert add_rows_(target, place, torch.tensor([1.0, 2.0, 4.0], device=device)) is target
    assert target.tolist() == [3, 1, 6]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_many_rows_in_few_places_give_the_same_bits_on_every_run(device, dtype):
    """20,000 rows of wild sizes in 7 places: any other order of summing shows."""
    place = torch.randint(7, (20_000,), generator=torch.Generator().manual_seed(1)).to(device)
    rows = (drawn(20_000, 3) * 10 ** (4 * drawn(20_000, 1, seed=2))).to(device=device, dtype=dtype)
    found = []
    for _ in range(5):
        source = drawn(7, 3, device=device, dtype=dtype).requires_grad_()
        (take_rows(source, place) * rows).sum().backward()
        found.append((add_rows_(torch.zeros(7, 3, device=device, dtype=dtype), place, rows), source.grad))
    for sums, gradient in found[1:]:
        assert torch.equal(sums, found[0][0]) and torch.equal(gradient, found[0][1])


def test_sums_are_differentiable_in_the_rows_and_those_of_fp64():
    place = torch.randint(5, (300,), generator=torch.Generator().manual_seed(1))
    rows = drawn(300, 4).requires_grad_()
    sums = add_rows_(torch.zeros(5, 4), place, rows)
    exact = torch.stack([rows.detach().double()[place == i].sum(0) for i in range(5)])
    assert (sums - exact).abs().max() < 1e-5  # 60 fp32 additions of size 1
    (sums * torch.arange(5.0)[:, None]).sum().backward()
    assert torch.equal(rows.grad, place.float()[:, None].expand(300, 4))


@pytest.mark.parametrize("device", DEVICES)
def test_a_training_step_has_the_same_gradients_to_the_bit_when_done_again(device, smallest, rough_model):
    """With every loss that gathers or adds rows: picked keys, experts, the balance of samples."""
    model = rough_model(smallest).to(device)
    tokens = torch.randint(smallest.vocab_size, (4, 160), generator=torch.Generator().manual_seed(0)).to(
        device
    )
    found = []
    for _ in range(3):
        model.zero_grad()
        trace = Trace(wants_losses=True)
        loss = model(tokens, trace=trace).logsumexp(-1).mean()
        (loss + sum(trace.balance_loss) + trace.summed_indexer_loss()).backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert trace.csa_dropped > 0
    for again in found[1:]:
        assert all(torch.equal(gradient, again[name]) for name, gradient in found[0].items())
