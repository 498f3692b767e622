"""Run packed layers on a CPU by operations in C++.

The sources in ``csrc`` are compiled once for a machine, kept on disk, and registered as operations.

One library serves all widths, shapes, kinds of grids and numbers of rows. It is built (10 to 20 seconds) where a packed
layer first runs on a CPU, or by ``tsq_layers.warmup``; later processes load it in milliseconds from
``tsq_layers/native``
in the user's cache directory (``XDG_CACHE_HOME``). Where it cannot be built, a warning says so once and
:mod:`tsq_layers.runtime.kernels` goes its other ways.

Operations, whose arguments are those of :mod:`tsq_layers.runtime.kernels`: ``tsq_layers::linear``,
``tsq_layers::dequantize``.
"""

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tsq_layers.errors import CompileWarning

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of inputs, outputs and dequantised weights."""

GRIDS = frozenset({"symmetric", "zero_points", "offsets", "row_tables", "group_tables"})
"""Kinds of grids that the operations know."""

FEW_ROWS = 16
"""Rows of input up to which codes are multiplied as they are decoded.

With more, blocks of the matrix are decoded first.
"""

_SOURCE = Path(__file__).with_name("csrc") / "operations.cpp"
_FLAGS = (
    "-O3",
    "-std=c++20",
    "-march=native",
    "-ffp-contract=off",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-w",
)
_COMPILERS = ("g++", "c++", "clang++")
_BUILD_SECONDS = 600

_log = logging.getLogger(__name__)
_usable: bool | None = None  # not known before the first use


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def usable() -> bool:
    """Return whether the operations are there; the first call loads or builds them.

    Warns:
        CompileWarning: once, if they cannot be built.
    """
    global _usable  # noqa: PLW0603  (what a process has loaded, it has loaded)
    if _usable is None:
        _usable = _load()
    return _usable


def is_loaded() -> bool:
    """Return whether the operations are there already."""
    return _usable is True


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def multiplies(dtype: torch.dtype) -> bool:
    """Return whether the processor multiplies a half-precision dtype faster than float32.

    That is so for many rows, where it has instructions for such products.
    """
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _load() -> bool:
    cure = "Install a C++ compiler (g++ or clang++, or name it in CXX)"
    try:
        try:
            folder = _folder()
        except OSError:
            cure = "Let XDG_CACHE_HOME name a directory that can be written"
            raise
        library = _built(folder)
        try:
            torch.ops.load_library(library)
        except (OSError, RuntimeError):  # damaged, for example by a disk that was full
            library.unlink(missing_ok=True)
            torch.ops.load_library(_built(folder))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        reason = " ".join(str(getattr(error, "stderr", None) or error).strip().splitlines()[:2])
        warnings.warn(
            f"the operations for packed layers on a CPU cannot be built ({reason}); torch.compile "
            f"is used instead, which is slower and compiles for each kind of layer. {cure}",
            CompileWarning,
            stacklevel=3,
        )
        return False
    torch.library.register_fake("tsq_layers::linear", _fake_linear)
    torch.library.register_fake("tsq_layers::dequantize", _fake_dequantize)
    return True


def _built(directory: Path) -> Path:
    """The library for this source, PyTorch, compiler and processor, in a directory; built if it is not there."""
    compiler = (
        shlex.split(os.environ.get("CXX", ""))
        or [path for path in map(shutil.which, _COMPILERS) if path][:1]
    )
    if not compiler:
        raise OSError(f"none of {', '.join(_COMPILERS)} is on the path")
    command = _command(compiler)
    sources = (file.read_text(encoding="utf-8") for file in sorted(_SOURCE.parent.glob("*.[ch]*")))
    key = (*sources, torch.__version__, *command, _processor())
    name = hashlib.sha256("\0".join(key).encode()).hexdigest()[:24] + ".so"
    library = directory / name
    if not library.exists():
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            made = Path(folder) / name
            subprocess.run(  # noqa: S603  (the compiler, and arguments of ours)
                [*command, str(_SOURCE), "-o", str(made), *_libraries()],
                check=True,
                capture_output=True,
                text=True,
                timeout=_BUILD_SECONDS,
            )
            with made.open("rb+") as handle:
                os.fsync(
                    handle.fileno()
                )  # a rename may survive a power cut that the content does not
            made.replace(library)  # at once, for processes that build at the same time
        _log.info("built %s in %.1f s", library, time.perf_counter() - started)
    return library


def _command(compiler: Sequence[str]) -> list[str]:
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return [*compiler, *_FLAGS, abi, f"-I{_torch('include')}"]


def _libraries() -> list[str]:
    return [f"-L{_torch('lib')}", "-lc10", "-ltorch_cpu"]


def _torch(folder: str) -> Path:
    return Path(torch.__file__).parent / folder


def _folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "tsq_layers" / "native"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _processor() -> str:
    """Return what ``-march=native`` depends on: a cache may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {platform.processor()} {flags}"


def _fake_linear(x: Tensor, words: Tensor, *_: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], words.shape[0])


def _fake_dequantize(words: Tensor, *arguments: Any) -> Tensor:
    *_, columns, dtype = arguments
    return words.new_empty(words.shape[0], columns, dtype=dtype)
