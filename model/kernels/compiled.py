"""C kernels of this folder, compiled on first use by the machine's own compiler.

Each is a plain C file that needs nothing but this folder's headers; the library lies in the user's cache
folder under a name that the sources, the flags, the compiler and the processor decide. Where there is no
compiler, or CONSILIENCE_KERNELS=off, the PyTorch twin does the work: same numbers to rounding, more time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
COMPILE_TIMEOUT_S = 120


@cache
def library(name: str) -> ctypes.CDLL | str:
    """The compiled `<name>.c`, or why there is none. Compiles once a machine, about a second."""
    if os.environ.get("CONSILIENCE_KERNELS", "on") == "off":
        return "switched off by CONSILIENCE_KERNELS=off"
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return "no C compiler found (install gcc or clang, or name one by CC)"
    source = Path(__file__).with_name(f"{name}.c")
    try:
        target = _cache_folder() / f"{name}-{_key(source, compiler)}.so"
        if not target.exists():
            _compile(compiler, source, target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", None) or str(error)
        return f"{compiler} does not make {source.name} into a library: {detail.strip()[:300]}"


def call(name: str, function: str, *arguments: Tensor | int | float | None) -> None:
    """Call `function` of library `name`: tensors as pointers (None: null), int as C long, float as float."""
    found = _bound.get(function) or _bind(name, function, arguments)
    found(*[_address(value) if isinstance(value, Tensor) else value for value in arguments])


_bound: dict[str, Any] = {}


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


def _address(tensor: Tensor) -> int:
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def _compile(compiler: str, source: Path, target: Path) -> None:
    """Beside its place, then renamed: processes that start together do not read half a library."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / target.name
        command = [compiler, *FLAGS, "-o", str(made), str(source), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
        made.replace(target)


def _key(source: Path, compiler: str) -> str:
    sources = [path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h")))]
    about = (*sources, " ".join(FLAGS).encode(), os.path.realpath(compiler).encode(), _processor())
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
