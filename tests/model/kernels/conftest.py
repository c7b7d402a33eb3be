"""Triton kernels run on the GPU if there is one, else under Triton's interpreter."""

import os

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined: before the first import of one


@pytest.fixture(scope="session")
def triton_device() -> str:
    """Where the kernels of `triton_*` files run here: "cuda", or "cpu" under the interpreter."""
    if torch.cuda.is_available():
        return "cuda"
    _repair_interpreter()
    return "cpu"


def _repair_interpreter() -> None:
    """Faults of Triton's interpreter that no GPU has: fp32 is cut to bf16, not rounded; a product takes bf16
    for integers; up to 3.6, numpy 2.4 does not turn its arrays of one entry into the bound of a loop."""
    from triton.runtime import interpreter

    builder, patch = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    if patch.__name__ == "repaired":
        return
    cast, dot = builder.cast_impl, builder.create_dot

    def repaired(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def rounded(self, source, target):
        kinds = source.get_element_ty(), interpreter.tl.bfloat16
        if kinds[0] != interpreter.tl.float32 or getattr(target, "scalar", target) != kinds[1]:
            return cast(self, source, target)
        numbers = torch.from_numpy(np.array(source.data, dtype=np.float32))
        bits = numbers.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, kinds[1])

    def widened(self, a, b, *rest):
        wide = interpreter.tl.float32
        a, b = (cast(self, x, wide) if x.get_element_ty() == interpreter.tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot = repaired, rounded, widened
