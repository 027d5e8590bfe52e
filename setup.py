"""Packaging of sglang_ext: a plugin for stock SGLang, loaded through SGLang's own entry point group."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

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
    "ruff>=0.8",
]

setup(
    name="sglang_ext",
    version="0.1.0",
    description="Deterministic-on-request inference and compute/communication overlap for stock SGLang",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["sglang_ext", "sglang_ext.*"]),
    install_requires=[SGLANG],
    extras_require=EXTRAS,
    entry_points={"sglang.srt.plugins": ["sglang_ext = sglang_ext.plugin:register"]},
)
