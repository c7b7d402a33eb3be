"""C kernels of this folder, compiled on first use by the machine's own compiler.

Each is a plain C file that needs nothing but this folder's headers and the PARTS named here; the library lies
in the user's cache folder under a name that the sources, the flags, the compiler and the processor decide.
Where there is no compiler, or CONSILIENCE_KERNELS=off, the PyTorch twin does the work: same numbers to
rounding, more time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# No product is fused with a sum unless the source says so: where a compiler fuses differs between the loop
# over whole vectors and the one over the rest, and a row's last bit must not depend on which of them it met.
EXACT = ("-ffp-contract=off",)
# Files of one library call each other, never a function of that name which the process had before: under a
# distribution's Python zlib's `compress` is such a one. macOS links so of itself.
OWN = ("-Wl,-Bsymbolic",) if sys.platform == "linux" else ()
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", *EXACT, "-shared", "-fPIC", *OWN)
COMPILE_TIMEOUT_S = 120
THREADS = "-fopenmp"  # left out where the compiler lacks it: then the rows of a kernel go by one thread
LEAST, FEWEST, MOST_PARTS = 1 << 15, 512, 8  # as in threads.h
PARTS = {"decode_step": ("decode_attention", "decode_moe", "hyper_connections", "norm_rotate")}


@cache
def library(name: str) -> ctypes.CDLL | str:
    """The compiled `<name>.c` with its PARTS, or why there is none. Compiles once a machine, some seconds."""
    if os.environ.get("CONSILIENCE_KERNELS", "on") == "off":
        return "switched off by CONSILIENCE_KERNELS=off"
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "no C compiler found (install gcc or clang, or name one by CC)"
    sources = [Path(__file__).with_name(f"{part}.c") for part in (name, *PARTS.get(name, ()))]
    try:
        target = _cache_folder() / f"{name}-{_key(sources, compiler)}.so"
        if not target.exists():
            _compile(compiler, sources, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return f"{compiler} does not make {name}.c into a library: {detail.strip()[:300]}"


def call(name: str, function: str, *arguments: Tensor | int | float | None) -> None:
    """Call `function` of library `name`: tensors as pointers (None: null), int as C long, float as float."""
    found = _bound.get(function) or _bind(name, function, arguments)
    if _threads.get(name) != (threads := torch.get_num_threads()):
        library(name).set_num_threads(ctypes.c_long(threads))  # type: ignore[union-attr]
        _threads[name] = threads
    found(*[address(value) if isinstance(value, Tensor) else value for value in arguments])


_bound: dict[str, Any] = {}
_threads: dict[str, int] = {}


def even_parts(num_rows: int, numbers_a_row: int) -> int:
    """Parts of rows that do not meet, as threads.h has it."""
    return max(1, min(torch.get_num_threads(), num_rows * numbers_a_row // LEAST))


def fixed_parts(num_rows: int) -> int:
    """Parts of rows that are summed, as threads.h has it: their number knows nothing of threads."""
    return max(1, min(MOST_PARTS, num_rows // FEWEST))


def _bind(name: str, function: str, arguments: tuple[Tensor | int | float | None, ...]) -> Any:
    """The C function with the types of these arguments: told once, ctypes converts far faster."""
    handle = library(name)
    assert isinstance(handle, ctypes.CDLL)
    kinds = {int: ctypes.c_long, float: ctypes.c_float}
    found = getattr(handle, function)
    found.argtypes = [kinds.get(type(value), ctypes.c_void_p) for value in arguments]
    found.restype = None
    _bound[function] = found
    return found


def address(tensor: Tensor) -> int:
    """Where the numbers of a contiguous tensor begin."""
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _compile(compiler: str, sources: list[Path], target: Path) -> None:
    """Beside its place, then renamed: processes that start together do not read half a library."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [compiler, *FLAGS, "-o", str(made), *map(str, sources), "-lm"]
        settings = {"capture_output": True, "text": True, "timeout": COMPILE_TIMEOUT_S}
        if subprocess.run([*command, THREADS], **settings).returncode:
            subprocess.run(command, check=True, **settings)
        made.replace(target)


def _key(sources: list[Path], compiler: str) -> str:
    headers = sorted(sources[0].parent.glob("*.h"))
    about = (
        *(path.read_bytes() for path in (*sources, *headers)),
        " ".join((*FLAGS, THREADS)).encode(),
        os.path.realpath(compiler).encode(),
        _processor(),
    )
    return hashlib.sha256(b"\0".join(about)).hexdigest()[:16]


def _processor() -> bytes:
    """What -march=native looks at: model and features of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()
    told = {line.split(":")[0].strip(): line for line in lines if line.strip()}
    return "\n".join(told.get(k, "") for k in ("model name", "flags", "Features", "CPU part")).encode()


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "consilience" / "kernels"
