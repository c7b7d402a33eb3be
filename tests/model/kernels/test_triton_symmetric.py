"""Symmetric products against fp64, and the Newton–Schulz iteration they serve; on a GPU, or interpreted.

Products of bf16 numbers are exact in fp32: the tolerance is that of fp32 sums and one rounding to bf16.
"""

import pytest
import torch

pytestmark = pytest.mark.triton
torch.set_num_threads(1)


def draw(*shape, seed=0, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(device)


@pytest.fixture(params=["small", "large"])
def config(request, monkeypatch):
    from consilience.model.kernels import triton_symmetric

    monkeypatch.setitem(triton_symmetric.TILE_TIME, request.param, 0.0)
    return request.param


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 144, 48), (2, 272, 80)])
def test_a_product_is_that_of_fp64_rounded_once_and_symmetric_to_the_last_bit(shape, config, triton_device):
    from consilience.model.kernels.triton_symmetric import product

    x = draw(*shape, device=triton_device)
    found = product(x, torch.full((shape[0], shape[1], shape[1]), float("nan")).to(x))
    wide = x.double()
    bound = 2**-8 * (wide @ wide.mT).abs() + 2**-20 * (wide.abs() @ wide.abs().mT)
    assert bool(((found.double() - wide @ wide.mT).abs() <= bound).all())
    assert torch.equal(found, found.mT)


def test_the_epilogue_makes_a_polynomial_of_a_symmetric_matrix(config, triton_device):
    from consilience.model.kernels.triton_symmetric import product

    x = draw(2, 272, 64, device=triton_device)
    gram = product(x, x.new_empty(2, 272, 272))
    found = product(gram, torch.empty_like(gram), gram, scale=0.5, addend_scale=-3.0, diagonal=7.0)
    wide = gram.double()
    wanted = 0.5 * wide @ wide - 3.0 * wide + 7.0 * torch.eye(272, dtype=torch.float64, device=x.device)
    # Terms cancel: fp32 roundings of the terms, then one of the result.
    bound = 2**-8 * wanted.abs() + 2**-19 * (wide.abs() @ wide.abs())
    assert bool(((found.double() - wanted).abs() <= bound).all())
    assert torch.equal(found, found.mT)


def test_two_rows_worked_by_hand(triton_device):
    from consilience.model.kernels.triton_symmetric import product

    x = torch.zeros(1, 16, 16, dtype=torch.bfloat16, device=triton_device)
    x[0, 0, :2], x[0, 1, :2] = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
    found = product(x, torch.empty_like(x), scale=2.0, diagonal=0.5)
    assert found[0, :3, :3].tolist() == [[10.5, 2.0, 0.0], [2.0, 20.5, 0.0], [0.0, 0.0, 0.5]]


def test_a_matrix_has_the_same_bits_in_any_batch(config, triton_device):
    from consilience.model.kernels.triton_symmetric import product

    x = draw(5, 144, 48, device=triton_device)
    together = product(x, x.new_empty(5, 144, 144))
    for i in (0, 2, 4):
        assert torch.equal(product(x[i : i + 1], x.new_empty(1, 144, 144))[0], together[i])


def test_the_setting_leaves_few_processors_idle_in_the_last_round():
    from consilience.model.kernels.triton_symmetric import CONFIGS, _launch

    cpu = torch.device("cpu")
    # 528 small tiles are four full rounds; 272 large ones two and a rest. Of 32 matrices rests do not count.
    assert _launch(1, 4096, cpu)[0] == CONFIGS["small"]
    assert _launch(32, 4096, cpu)[0] == CONFIGS["large"]


def test_other_shapes_are_refused(triton_device):
    from consilience.model.kernels.triton_symmetric import product

    x = draw(2, 32, 48, device=triton_device)
    for given, out in ((x, x.new_empty(2, 48, 48)), (x[:, :24], x.new_empty(2, 24, 24)), (x.mT, x)):
        with pytest.raises(ValueError, match="multiples of 16"):
            product(given, out)


def test_every_pair_of_rows_lies_in_one_tile_or_its_mirror():
    from consilience.model.kernels.triton_symmetric import _order

    for n, m, width in ((2048, 128, 256), (1024, 128, 128), (656, 128, 256), (144, 128, 256)):
        covered = torch.zeros(n, n, dtype=torch.int32)
        for i, j in _order(n, m, width, torch.device("cpu")).tolist():
            covered[i * m : (i + 1) * m, j * width : (j + 1) * width] += 1
        assert bool((covered.triu() == torch.ones(n, n).triu()).all())


@pytest.mark.parametrize(("n", "m"), [(144, 144), (128, 400)])
def test_singular_values_go_where_the_ten_steps_send_them(n, m, triton_device):
    """Against fp64 singular vectors, with the singular values mapped by the scalar iteration.

    bf16 rounds to 2^-9; the last step's two operands and result are rounded once each, what the steps before
    leave is drawn to 1 by the polish: 2^-6 is eight roundings.
    """
    from consilience.model.kernels.newton_schulz import COEFFICIENTS, iterate_halves

    g = torch.randn(2, n, m, generator=torch.Generator().manual_seed(3))
    u, s, vh = torch.linalg.svd(g.double(), full_matrices=False)
    mapped = s / torch.linalg.vector_norm(g.double(), dim=(1, 2))[:, None]
    for a, b, c in COEFFICIENTS:
        mapped = a * mapped + b * mapped**3 + c * mapped**5
    found = iterate_halves(g.to(triton_device)).double().cpu()
    wanted = (u * mapped[:, None]) @ vh
    assert (torch.linalg.svdvals(found) - mapped.sort(descending=True).values).abs().max() < 2**-6
    assert (found - wanted).norm() < 2**-6 * wanted.norm()


def test_matrices_on_a_gpu_go_through_in_parts_and_tall_ones_lying(triton_device, monkeypatch):
    from consilience.model.kernels import newton_schulz as ns

    monkeypatch.setattr(ns, "can_use_triton", lambda *_: True)
    g = torch.randn(2, 176, 128, generator=torch.Generator().manual_seed(4)).to(triton_device)
    few = ns.newton_schulz(g)
    assert torch.equal(few, ns.newton_schulz_plainly(g.bfloat16()).float())
    monkeypatch.setattr(ns, "FEWEST_TILES", 1)
    together = ns.newton_schulz(g)
    assert together.dtype == torch.float32 and together.shape == g.shape
    monkeypatch.setattr(ns, "MOST_ENTRIES", 176 * 128)
    # Not bit for bit: a library may choose another product for one matrix than for two.
    assert (together - ns.newton_schulz(g)).norm() < 2**-6 * together.norm()
    assert (together - ns.newton_schulz_plainly(g)).norm() < 2**-6 * together.norm()
    narrow = g[:, :, :64]  # half of a product of 64 rows is no less work
    assert torch.equal(ns.newton_schulz(narrow), ns.newton_schulz_plainly(narrow))
