"""The compiled mHC against its twin in fp64, at every remainder of a lane block; without a compiler."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from consilience.model.config import TINY
from consilience.model.hyper_connections import HeadCollapse, HyperConnection
from consilience.model.kernels import compiled
from consilience.model.kernels import hyper_connections as fused


def _modules(streams: int, width: int, dtype: torch.dtype):
    config = TINY.__class__(**{**vars(TINY), "hc_mult": streams, "hidden_size": width})
    generator = torch.Generator().manual_seed(streams * 1000 + width)
    modules = HyperConnection(config), HeadCollapse(config)
    for module in modules:
        for parameter in module.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
        module.to(dtype)
    return modules


def _run(streams: int, width: int, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Values and all gradients of a read, a write and a collapse in a row."""
    connection, collapse = _modules(streams, width, dtype)
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, streams, width, generator=generator).to(dtype).requires_grad_()
    layer_input, post, comb = connection.read(x)
    written = connection.write(x, 2 * torch.tanh(layer_input), post, comb)
    out = collapse(written)
    (out * torch.randn(out.shape, generator=generator).to(dtype)).sum().add(
        written.square().mean()
    ).backward()
    gradients = [p.grad for m in (connection, collapse) for p in m.parameters()]
    return [v.detach() for v in (layer_input, post, comb, written, out)] + [x.grad, *gradients]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("streams", "width", "tokens"),
    [(4, 64, 37), (4, 64, 1), (4, 64, 16), (4, 5, 15), (2, 16, 33), (3, 7, 17), (8, 24, 48)],
)
def test_values_and_gradients_are_the_twins_in_fp64(streams, width, tokens):
    assert fused.is_available(torch.zeros(1)), compiled.library("hyper_connections")
    for ours, exact in zip(
        _run(streams, width, tokens, torch.float32), _run(streams, width, tokens, torch.float64)
    ):
        assert ours.dtype == torch.float32 and exact.dtype == torch.float64
        assert_close(ours.double(), exact, rtol=1e-4, atol=2e-6 * float(exact.abs().max()) + 1e-9)


def test_what_is_not_fp32_on_the_cpu_goes_to_the_twin():
    assert not fused.is_available(torch.zeros(1, dtype=torch.float64))
    assert not fused.is_available(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
    assert not fused.is_available(torch.zeros(1, device="meta"))


_WITHOUT = """
import sys, torch
from consilience.model.kernels import compiled, hyper_connections as fused
from consilience.model.config import TINY
from consilience.model.hyper_connections import HyperConnection
print(compiled.library("hyper_connections"))
connection = HyperConnection(TINY); torch.nn.init.zeros_(connection.fn)
print(fused.is_available(torch.zeros(1)), tuple(connection.read(torch.ones(3, 4, 64))[0].shape))
"""


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"CONSILIENCE_KERNELS": "off"}, "switched off"),
        ({"CC": "no-such-compiler"}, "no C compiler"),
        ({"CC": "false"}, "does not make"),
    ],
)
def test_without_a_compiler_the_twin_works_and_the_reason_is_told(tmp_path, environment, reason):
    import os

    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", _WITHOUT], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    told, result = done.stdout.strip().rsplit("\n", 1)
    assert reason in told and result == "False (3, 64)"


def test_a_changed_source_or_compiler_gets_a_library_of_its_own(tmp_path, monkeypatch):
    source = tmp_path / "k.c"
    source.write_text("int one(void) { return 1; }")
    first = compiled._key([source], "/usr/bin/cc")
    assert compiled._key([source], "/usr/bin/cc") == first
    source.write_text("int one(void) { return 2; }")
    assert compiled._key([source], "/usr/bin/cc") != first
