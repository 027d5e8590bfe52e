"""What replicas must have in common before one address stands for them, from their ``/server_info``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_ext.llm42.observability.configuration import ARGUMENTS

#: Of the internal states, one for each data-parallel rank: canonical fingerprint, digest of packages, model,
#: device and flags.
STATES = ("llm42_fingerprint", "llm42_configuration")

#: Flags that a deterministic output, or whether there is one, depends on: these, and :data:`FLAG_FAMILIES`.
#: Addresses, keys and sizes that a node's memory decides differ between replicas and are not among them.
FLAGS = (*ARGUMENTS, "model_path", "revision", "served_model_name", "enable_llm42", "enable_lora")
FLAG_FAMILIES = ("llm42_", "tokenweave_")


def identity_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a server's ``/server_info`` that must be the same on all replicas.

    Raises:
        ValueError: this is no ``/server_info``.
    """
    states = info.get("internal_states")
    if not isinstance(states, list) or not all(isinstance(state, Mapping) for state in states):
        raise ValueError("no internal_states in it")
    return {
        "version": info.get("version"),
        **{key: sorted({str(state.get(key)) for state in states}) for key in STATES},
        "flags": {name: value for name, value in info.items() if _is_compared(name)},
    }


def _is_compared(name: str) -> bool:
    return name in FLAGS or name.startswith(FLAG_FAMILIES)
