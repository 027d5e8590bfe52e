"""Packaging of sglang_ext: a plugin for stock SGLang, loaded through SGLang's own entry point group.

The TokenWeave kernel is compiled when torch and nvcc are at hand (``pip install --no-build-isolation .``);
otherwise the package is pure Python and compiles the same sources on first use. SGLANG_EXT_BUILD_CUDA=0
skips the compilation, SGLANG_EXT_BUILD_CUDA=1 fails without it.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

HERE = Path(__file__).parent

#: 3.11 is the oldest whose standard library we use. SGLang 0.5.17 pins outlines 0.1.11, and there is no wheel
#: of its compiled part (outlines-core 0.1.26) for 3.13. scripts/environment.sh looks for the same versions.
PYTHON = ">=3.11,<3.13"

#: The one SGLang release whose internals our hooks were checked against (see sglang_ext/hooks.py).
SGLANG = "sglang==0.5.17"

EXTRAS = {
    "demo": ["accelerate>=1.0", "gguf>=0.10"],
    "ray": ["ray[default]>=2.55.1"],
    "gpu-build": ["ninja>=1.11", "setuptools>=69"],
}
EXTRAS["test"] = [
    *EXTRAS["demo"],
    "hypothesis>=6.100",
    "mypy>=1.11",
    "openai>=1.50",
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.8",
    "ruff>=0.8",
]


def cuda_extension() -> dict[str, Any]:
    """Arguments of ``setup`` that build the kernel library, or nothing for a pure-Python installation."""
    switch = os.environ.get("SGLANG_EXT_BUILD_CUDA", "auto")
    if switch not in ("0", "1", "auto"):
        raise SystemExit(f"SGLANG_EXT_BUILD_CUDA must be 0, 1 or auto, not {switch!r}")
    if switch == "0":
        return {}
    spec = importlib.util.spec_from_file_location("build_settings", HERE / "sglang_ext/tokenweave/build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    home, torch = build.cuda_home(), importlib.util.find_spec("torch")
    if home is None or torch is None:
        if switch == "1":
            raise SystemExit("SGLANG_EXT_BUILD_CUDA=1 needs torch and nvcc (set CUDA_HOME to the toolkit)")
        return {}

    # Both are read by torch on import: the true toolkit folder, and targets that need no GPU present.
    os.environ["CUDA_HOME"] = str(home)
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", build.ARCHITECTURES)
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    extension = CUDAExtension(
        f"sglang_ext.{build.LIBRARY}",
        [f"cuda/{source}" for source in build.SOURCES],
        py_limited_api=True,
        extra_compile_args={"cxx": list(build.CXX_FLAGS), "nvcc": list(build.NVCC_FLAGS)},
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


setup(
    name="sglang_ext",
    version="0.1.0",
    description="Deterministic-on-request inference and compute/communication overlap for stock SGLang",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=PYTHON,
    packages=[*find_packages(include=["sglang_ext", "sglang_ext.*"]), "sglang_ext.cuda"],
    package_dir={"sglang_ext.cuda": "cuda"},
    package_data={"sglang_ext.cuda": ["*.cu", "*.cuh", "*.h", "*.cpp"]},
    install_requires=[SGLANG, "greenlet>=3.1"],
    extras_require=EXTRAS,
    entry_points={"sglang.srt.plugins": ["sglang_ext = sglang_ext.plugin:register"]},
    **cuda_extension(),
)
