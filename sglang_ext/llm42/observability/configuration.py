"""Digest of what, beside the request and the weights, a deterministic output depends on.

It tells two configurations apart that cannot be expected to agree (``docs/determinism.md``). It does not
read the weights: their version stands beside it in the commit log.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: Packages whose code computes logits or tokens.
PACKAGES = ("sglang", "sglang_ext", "torch", "transformers", "sglang-kernel", "flashinfer-python", "triton")

#: Server arguments that choose kernels, shapes or number formats.
ARGUMENTS = (
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "load_format",
    "tp_size",
    "ep_size",
    "attention_backend",
    "prefill_attention_backend",
    "decode_attention_backend",
    "grammar_backend",
    "enable_torch_compile",
    "enable_fp32_lm_head",
    "enable_tokenweave",
    "tokenweave_canonical_split",
    "tokenweave_path",
    "tokenweave_ctas",
    "tokenweave_reserve",
    "llm42_window_size",
    "llm42_verify_batch_size",
)

#: Entries of a model's configuration that say where it lies or who wrote it.
_NOT_THE_MODEL = ("_name_or_path", "name_or_path", "transformers_version")


def digest(description: Mapping[str, Any]) -> str:
    """SHA-256, in hex, of a description of a configuration, whatever the order of its entries."""
    text = json.dumps(description, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def describe(server_args: Any, model_runner: Any) -> dict[str, Any]:
    """The configuration of this scheduler."""
    return {
        "packages": {name: _version(name) for name in PACKAGES},
        "arguments": {name: getattr(server_args, name, None) for name in ARGUMENTS},
        "dtype": str(model_runner.dtype),
        "model": _model(model_runner.model_config.hf_config),
        "device": _device(str(model_runner.device)),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _model(hf_config: Any) -> dict[str, Any]:
    return {name: value for name, value in hf_config.to_dict().items() if name not in _NOT_THE_MODEL}


def _device(device: str) -> dict[str, Any]:
    import torch

    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return {
            "name": properties.name,
            "processors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
    return {
        "name": _cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
