"""Triton kernels run on the GPU if there is one, else under Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before the first import of one


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Where the kernels of `triton_*` files run here: "cuda", or "cpu" under the interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
