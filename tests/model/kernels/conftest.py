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
    """Faults of Triton's interpreter that no GPU has: fp32 is cut to bf16 and e4m3, not rounded to even; bf16
    below the normal numbers widens to something else; a product takes bf16 for integers; up to 3.6, numpy
    2.4 does not turn its arrays of one entry into the bound of a loop."""
    from triton.runtime import interpreter

    builder, patch = interpreter.InterpreterBuilder, interpreter._patch_lang_tensor
    if patch.__name__ == "repaired":
        return
    cast, dot, convert = builder.cast_impl, builder.create_dot, builder.create_fp_to_fp
    tl = interpreter.tl

    def repaired(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def rounded(self, source, target):
        kinds = source.get_element_ty(), getattr(target, "scalar", target)
        if kinds == (tl.bfloat16, tl.float32):
            wide = source.data.view(np.uint16).astype(np.uint32) << 16
            return interpreter.TensorHandle(wide.view(np.float32), tl.float32)
        if kinds != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        numbers = torch.from_numpy(np.array(source.data, dtype=np.float32))
        bits = numbers.bfloat16().view(torch.int16).numpy().view(np.uint16)
        return interpreter.TensorHandle(bits, tl.bfloat16)

    def rounded_to_fp8(self, source, target, mode):
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.float8e4nv):
            return convert(self, source, target, mode)
        numbers = torch.from_numpy(np.array(source.data, dtype=np.float32)).clamp(-448, 448)
        bits = numbers.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return interpreter.TensorHandle(bits, tl.float8e4nv)

    def widened(self, a, b, *rest):
        a, b = (cast(self, x, tl.float32) if x.get_element_ty() == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    interpreter._patch_lang_tensor, builder.cast_impl, builder.create_dot = repaired, rounded, widened
    builder.create_fp_to_fp = rounded_to_fp8
