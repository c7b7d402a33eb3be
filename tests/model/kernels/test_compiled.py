"""The compiled libraries as such: what they call is their own."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
# A global library that has every function's name, as zlib has `compress` under a distribution's Python.
PROGRAM = """
import ctypes, subprocess, sys
from pathlib import Path

from consilience.model.kernels.compiled import library

folder, symbols = Path(sys.argv[1]), sys.argv[2].split()
source = folder / "other.c"
others = [f"void {name}(void) {{ exit(3); }}\\n" for name in symbols]
source.write_text("#include <stdlib.h>\\n" + "".join(others))
subprocess.run(["cc", "-shared", "-fPIC", "-o", str(folder / "other.so"), str(source)], check=True)
ctypes.CDLL(str(folder / "other.so"), ctypes.RTLD_GLOBAL)

import torch
from consilience.model.config import TINY
from consilience.model.initialize import initialize
from consilience.model.kernels import decode_step
from consilience.model.state import DecodeState
from consilience.model.transformer import Transformer

torch.set_num_threads(1)
model = initialize(Transformer(TINY), 0).requires_grad_(False)
state = DecodeState.allocate(TINY, 2, 256)
calls = []
inner = decode_step.step
decode_step.step = lambda *arguments: calls.append(1) or inner(*arguments)
with torch.no_grad():
    for step in range(130):
        out = model.hidden(torch.full((2, 1), step), state=state)
assert calls and bool(torch.isfinite(out).all())
"""
NAMES = "attend compress pick moe_route moe_forward hc_read_forward hc_write_forward norm_rotate_forward"


def test_functions_of_the_same_name_elsewhere_in_the_process_are_not_called(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), NAMES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
