"""Where the CUDA sources are, how they are compiled, and how the compiled library is loaded.

Imports nothing but the standard library at the top, because ``setup.py`` reads its constants from here.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

#: Sources, relative to :func:`source_folder`.
SOURCES = ("bind.cpp", "allreduce_rmsnorm.cu")
#: Ahead-of-time targets: 8.0 serves the peer transport only (no multimem before Hopper); "a" code is not
#: forward compatible, hence plain 9.0 PTX for what comes after.
ARCHITECTURES = "8.0;9.0a;9.0+PTX"
CXX_FLAGS = ("-O3", "-std=c++17")
NVCC_FLAGS = ("-O3", "-std=c++17")
#: Name of the compiled module, without the platform's suffix.
LIBRARY = "_tokenweave"

_PACKAGE = Path(__file__).resolve().parent.parent


class KernelUnavailableError(RuntimeError):
    """The kernel library is neither installed nor can it be compiled here; the message says why."""


def source_folder() -> Path:
    """Folder of the CUDA sources: inside the installed package, or ``cuda/`` of a source checkout.

    Raises:
        KernelUnavailableError: neither folder exists.
    """
    for folder in (_PACKAGE / "cuda", _PACKAGE.parent / "cuda"):
        if (folder / SOURCES[0]).is_file():
            return folder
    raise KernelUnavailableError("the CUDA sources of sglang_ext are not installed")


def installed_library() -> Path | None:
    """The library that ``setup.py`` built, or None in a pure-Python installation."""
    return next(iter(sorted(_PACKAGE.glob(f"{LIBRARY}*.so"))), None)


@functools.cache
def cuda_home() -> Path | None:
    """Folder of the CUDA toolkit that holds ``bin/nvcc`` itself, or None without a compiler.

    ``nvcc`` on the search path may be a wrapper script elsewhere, from which torch would guess a wrong
    folder; so nvcc is asked where it lives.
    """
    for name in ("CUDA_HOME", "CUDA_PATH"):
        folder = Path(os.environ.get(name) or "/nonexistent")
        if (folder / "bin" / "nvcc").is_file():
            return folder
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        return None
    command = [nvcc, "-dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    match = re.search(r"^#\$ _HERE_=(.+)$", answer.stderr, re.MULTILINE)
    return Path(match.group(1)).parent if match else None


@functools.cache
def load() -> None:
    """Register ``torch.ops.sglang_ext_tokenweave``: from the installed library, else compiled just in time.

    The compiled library is cached by torch and the build is locked by file, so that the ranks of one node
    compile once.

    Raises:
        KernelUnavailableError: no installed library and no CUDA compiler, or compilation failed.
    """
    import torch

    library = installed_library() or _compile()
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise KernelUnavailableError(f"{library} cannot be loaded: {error}") from error


def _compile() -> Path:
    """Compile the sources for the GPUs of this machine and return the library."""
    home = cuda_home()
    if home is None:
        raise KernelUnavailableError(
            "the TokenWeave kernel is not installed and no nvcc was found; set CUDA_HOME to a CUDA toolkit"
        )
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(home)
    folder = source_folder()
    try:
        library = cpp_extension.load(
            name="sglang_ext_tokenweave",
            sources=[str(folder / source) for source in SOURCES],
            extra_cflags=list(CXX_FLAGS),
            extra_cuda_cflags=list(NVCC_FLAGS),
            is_python_module=False,
        )
    except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
        raise KernelUnavailableError(f"compiling the TokenWeave kernel failed: {error}") from error
    return Path(library)
