"""Environment variables that a rank gets from the server's process.

A Ray worker has the environment of its node's raylet, started some other day by somebody else. What the
ranks compute with must come from the command that starts the server, so it is handed on: these variables,
those of ``--ray-env``, and no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

#: Beginnings of names.
FAMILIES = (
    "SGLANG_",
    "SGL_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "PYTORCH_",
    "FLASHINFER_",
    "TRITON_",
    "CUTE_DSL_",
    "CUBLAS_",
    "HF_",
)

#: Whole names.
NAMES = (
    "PYTHONPATH",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TP_SOCKET_IFNAME",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUDA_MODULE_LOADING",
    "TRTLLM_ENABLE_PDL",
    "TRANSFORMERS_OFFLINE",
)

#: Not handed on, although a family has them: of a node or of the server's process, or secret. Ray shows the
#: environment of jobs and actors in its dashboard; whoever accepts that can name a secret in ``--ray-env``.
NOT_HANDED_ON = (
    "SGLANG_HOST_IP",
    "SGLANG_EXT_RAY_NODE_ADDRESS",
    "SGLANG_EXT_FRONT_API_KEY",
    "SGLANG_EXT_FRONT_EXPECTED",
    "SGLANG_RAY_BUNDLE_INDICES",
    "SGLANG_DP_RANK",
    "HF_TOKEN",
    "HF_HUB_TOKEN",
)

#: Handed on, but not compared between ranks: Ray adds to the path.
NOT_COMPARED = ("PYTHONPATH",)

#: Ray narrows CUDA_VISIBLE_DEVICES to the one GPU of each actor. Ranks of a node must see each other's
#: GPU, so they keep the whole list and choose by ordinal (devices.py).
KEEP_ALL_GPUS = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


def is_handed_on(name: str, extra: Sequence[str] = ()) -> bool:
    """Whether ranks get the variable of this name."""
    if name in extra:
        return True
    return name not in NOT_HANDED_ON and (name in NAMES or name.startswith(FAMILIES))


def handed_on(environment: Mapping[str, str], extra: Sequence[str] = ()) -> dict[str, str]:
    """The part of ``environment`` that ranks get; ``extra`` are names beside the fixed list."""
    return {name: value for name, value in environment.items() if is_handed_on(name, extra)}


def compared(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of a rank's environment that must be the same everywhere; --ray-env may name secrets."""
    return {name: value for name, value in handed_on(environment).items() if name not in NOT_COMPARED}
