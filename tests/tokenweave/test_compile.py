"""The kernel compiles, and holds the multimem instructions where they belong."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from sglang_ext.tokenweave import build

pytestmark = pytest.mark.skipif(build.cuda_home() is None, reason="no nvcc found (set CUDA_HOME)")


def _nvcc(tmp_path: Path, *flags: str, suffix: str) -> Path:
    output = tmp_path / f"kernel.{suffix}"
    home = build.cuda_home()
    assert home is not None
    source = build.source_folder() / "allreduce_rmsnorm.cu"
    command = [str(home / "bin/nvcc"), *build.NVCC_FLAGS, *flags, "-o", str(output), str(source)]
    subprocess.run(command, check=True, timeout=300)
    return output


def _cuobjdump() -> str:
    home = build.cuda_home()
    triton = find_spec("triton")
    folders = [str(home / "bin")] if home else []
    if triton and triton.origin:
        folders.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return shutil.which("cuobjdump", path=":".join(folders)) or pytest.skip(
        "no cuobjdump in toolkit or triton"
    )


def test_hopper_code_reduces_and_broadcasts_in_the_switch(tmp_path: Path) -> None:
    tool = _cuobjdump()
    binary = _nvcc(tmp_path, "-gencode=arch=compute_90a,code=sm_90a", "-c", suffix="o")
    dump = subprocess.run(
        [tool, "-sass", str(binary)], check=True, capture_output=True, text=True, timeout=120
    )
    kernels = re.split(r"Function : ", dump.stdout)[1:]
    multicast = [kernel for kernel in kernels if "MulticastTransport" in kernel.splitlines()[0]]
    peer = [kernel for kernel in kernels if "PeerTransport" in kernel.splitlines()[0]]
    assert len(multicast) == 4 and len(peer) == 20
    for kernel in multicast:
        dtype = "BF16x8" if "bfloat16" in kernel.splitlines()[0] else "F16x8"
        # fp32 accumulation in the switch, never the 16-bit default.
        assert f"LDGMC.E.F32ADD.{dtype}.RN.STRONG.SYS" in kernel
        assert "STG.E.128.STRONG.SYS" in kernel
    for kernel in peer:
        assert "LDGMC" not in kernel
        assert "LDG.E.128.STRONG.SYS" in kernel and "STG.E.128.STRONG.SYS" in kernel


def test_ptx_broadcasts_with_multimem_and_orders_the_flags(tmp_path: Path) -> None:
    ptx = _nvcc(tmp_path, "-arch=compute_90", "-ptx", suffix="ptx").read_text()
    # In SASS a multimem store looks like a plain one.
    assert "multimem.st.relaxed.sys.global.v4.f32" in ptx
    assert "st.release.sys.global.u32" in ptx and "ld.acquire.sys.global.u32" in ptx


def test_ampere_code_has_the_peer_transport_only(tmp_path: Path) -> None:
    ptx = _nvcc(tmp_path, "-arch=compute_80", "-ptx", suffix="ptx").read_text()
    assert "multimem" not in ptx and "ld.relaxed.sys.global.v4.u32" in ptx
