"""SGLang's server arguments with ours added; every SGLang process sees this class."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

import torch
from sglang.srt.arg_groups.arg_utils import A, Arg
from sglang.srt.server_args import ServerArgs as SGLangServerArgs

from sglang_ext import hooks
from sglang_ext.llm42 import requirements
from sglang_ext.llm42.decode_policy import DecodeMode
from sglang_ext.ray import requirements as ray_requirements
from sglang_ext.ray.requirements import RaySettings
from sglang_ext.tokenweave.config import TokenWeaveConfig

#: The original's mode numbers: it had three ways to make GEMMs invariant, ours has one that needs no choice.
LLM42_MODES = (1, 2, 3)

#: Our fields stand in an argument group of their own, so SGLang must not add them itself.
_OURS = Arg(no_cli=True)


def llm42_mode(value: Any) -> bool:
    """Whether a value of ``--enable-llm42`` switches LLM-42 on; mode numbers of the original are all alike.

    Raises:
        ValueError: the value is neither a bool, None nor one of :data:`LLM42_MODES`.
    """
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, int) and value in LLM42_MODES:
        return True
    raise ValueError(
        f"--enable-llm42: {value!r} is none of {', '.join(map(str, LLM42_MODES))} (it needs no value at all)"
    )


def _llm42_mode_of_text(text: str) -> bool:
    try:
        return llm42_mode(int(text) if text.isdecimal() else text)
    except ValueError as error:
        # argparse puts the flag's name in front of the message itself.
        raise argparse.ArgumentTypeError(str(error).partition(": ")[2]) from None


@dataclasses.dataclass
class ServerArgs(SGLangServerArgs):
    """SGLang's ``ServerArgs`` plus the flags of this package.

    Raises:
        ValueError: a flag of ours has a nonsensical value, or is used with something that it does not
            support yet; the message names the flags and the reason.
    """

    enable_llm42: A[bool | None, _OURS] = False
    llm42_window_size: A[int, _OURS] = 64
    llm42_verify_batch_size: A[int, _OURS] = 8
    llm42_max_wait_steps: A[int, _OURS] = 4
    llm42_mark_all: A[bool, _OURS] = False
    llm42_disable_overlap_verification: A[bool, _OURS] = False
    llm42_disable_smaller_passes: A[bool, _OURS] = False
    llm42_canonical_decode: A[str, _OURS] = "auto"
    llm42_commit_log: A[str | None, _OURS] = None
    llm42_commit_log_max_bytes: A[int, _OURS] = 256 * 1024 * 1024
    llm42_commit_log_keep: A[int, _OURS] = 4

    enable_tokenweave: A[bool, _OURS] = False
    tokenweave_split: A[str, _OURS] = TokenWeaveConfig.split
    tokenweave_canonical_split: A[str, _OURS] = TokenWeaveConfig.canonical_split
    tokenweave_min_tokens: A[int | None, _OURS] = TokenWeaveConfig.min_tokens
    tokenweave_ctas: A[int, _OURS] = TokenWeaveConfig.ctas
    tokenweave_fused_ctas: A[int | None, _OURS] = TokenWeaveConfig.fused_ctas
    tokenweave_reserve: A[bool, _OURS] = TokenWeaveConfig.reserve
    tokenweave_path: A[str, _OURS] = TokenWeaveConfig.path
    tokenweave_barrier_timeout: A[float, _OURS] = TokenWeaveConfig.barrier_timeout
    tokenweave_table: A[str | None, _OURS] = None

    ray_address: A[str | None, _OURS] = RaySettings.address
    ray_namespace: A[str | None, _OURS] = RaySettings.namespace
    ray_placement_group: A[str | None, _OURS] = RaySettings.placement_group
    ray_env: A[list[str] | None, _OURS] = None
    ray_start_timeout: A[float, _OURS] = RaySettings.start_timeout
    ray_on_failure: A[str, _OURS] = RaySettings.on_failure
    ray_max_restarts: A[int, _OURS] = RaySettings.max_restarts

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> None:
        """Add SGLang's flags and, in groups of their own, ours."""
        SGLANG_ADD_CLI_ARGS(parser)
        ServerArgs._add_llm42_args(parser)
        ServerArgs._add_tokenweave_args(parser)
        ServerArgs._add_ray_args(parser)

    @staticmethod
    def _add_llm42_args(parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group(
            "LLM-42 (sglang_ext)",
            "Deterministic requests: the same prompt, parameters and seed give the same output whatever else "
            "the server does. A request asks for it with is_deterministic; others run as usual.",
        )
        group.add_argument(
            "--enable-llm42",
            type=_llm42_mode_of_text,
            nargs="?",
            const=True,
            default=ServerArgs.enable_llm42,
            metavar="MODE",
            help="Serve deterministic requests by decode, verify and roll back. A mode number of the "
            "original implementation (1, 2 or 3) is accepted and makes no difference.",
        )
        group.add_argument(
            "--llm42-window-size",
            type=int,
            default=ServerArgs.llm42_window_size,
            metavar="W",
            help="Rows of a verification segment: candidates of one request that are verified at once, 1 to "
            f"{requirements.MAX_WINDOW_SIZE} (default: %(default)s).",
        )
        group.add_argument(
            "--llm42-verify-batch-size",
            type=int,
            default=ServerArgs.llm42_verify_batch_size,
            metavar="G",
            help="Segments of the largest canonical pass, which computes W times G rows "
            "(default: %(default)s).",
        )
        group.add_argument(
            "--llm42-max-wait-steps",
            type=int,
            default=ServerArgs.llm42_max_wait_steps,
            metavar="STEPS",
            help="Decode steps that a full window may wait for other requests to fill the canonical pass "
            "(default: %(default)s).",
        )
        group.add_argument(
            "--llm42-mark-all",
            action="store_true",
            default=ServerArgs.llm42_mark_all,
            help="Treat every request as deterministic that does not say is_deterministic=false.",
        )
        group.add_argument(
            "--llm42-disable-overlap-verification",
            action="store_true",
            default=ServerArgs.llm42_disable_overlap_verification,
            help="On a GPU: run canonical passes in front of decode steps instead of beside them.",
        )
        group.add_argument(
            "--llm42-disable-smaller-passes",
            action="store_true",
            default=ServerArgs.llm42_disable_smaller_passes,
            help="Always compute W times G rows. Otherwise a canonical pass that carries less is smaller, "
            "where the certification at start finds that this gives the same bits.",
        )
        group.add_argument(
            "--llm42-canonical-decode",
            choices=[mode.value for mode in DecodeMode],
            default=ServerArgs.llm42_canonical_decode,
            help="Run decode steps in the shape and with the attention of canonical passes, so that what "
            "they decide needs no verification: auto (on a GPU, where enough rows of a step are "
            "deterministic), always or never. Deterministic output is the same either way "
            "(default: %(default)s).",
        )
        group.add_argument(
            "--llm42-commit-log",
            default=ServerArgs.llm42_commit_log,
            metavar="PATH",
            help="Write a JSON line for every deterministic request that ended to this file, for "
            "python -m sglang_ext.replay. With --dp-size > 1 each rank has its own: log.dp0.jsonl, ...",
        )
        group.add_argument(
            "--llm42-commit-log-max-bytes",
            type=int,
            default=ServerArgs.llm42_commit_log_max_bytes,
            metavar="BYTES",
            help="Size at which the commit log becomes PATH.1 and a new one starts (default: %(default)s).",
        )
        group.add_argument(
            "--llm42-commit-log-keep",
            type=int,
            default=ServerArgs.llm42_commit_log_keep,
            metavar="FILES",
            help="Rotated commit logs to keep beside the current one (default: %(default)s).",
        )

    @staticmethod
    def _add_tokenweave_args(parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group(
            "TokenWeave (sglang_ext)",
            "Overlap of tensor-parallel communication with compute: batches are cut in two, and the fused "
            "AllReduce + residual + RMSNorm of one half runs beside the other half's compute.",
        )
        group.add_argument(
            "--enable-tokenweave",
            action="store_true",
            default=ServerArgs.enable_tokenweave,
            help="Fuse AllReduce, residual add and RMSNorm, and weave large prefill batches. Needs --tp-size "
            "of at least 2; models that it does not fit run as usual, with a log line saying why.",
        )
        group.add_argument(
            "--tokenweave-split",
            default=ServerArgs.tokenweave_split,
            help="Where to cut: auto (tuning table, else wave model), equal, never (fused step only), or a "
            "number of tokens (default: %(default)s).",
        )
        group.add_argument(
            "--tokenweave-canonical-split",
            default=ServerArgs.tokenweave_canonical_split,
            help="How canonical passes of --enable-llm42 are cut: equal (halves) or never. Deterministic "
            "output may differ between the two (default: %(default)s).",
        )
        group.add_argument(
            "--tokenweave-min-tokens",
            type=int,
            default=ServerArgs.tokenweave_min_tokens,
            metavar="N",
            help="Smallest batch that may be cut (default: 1024, or 2048 for a mixture of experts).",
        )
        group.add_argument(
            "--tokenweave-ctas",
            type=int,
            default=ServerArgs.tokenweave_ctas,
            metavar="N",
            help="Thread blocks of the fused kernel beside compute (default: %(default)s).",
        )
        group.add_argument(
            "--tokenweave-fused-ctas",
            type=int,
            default=ServerArgs.tokenweave_fused_ctas,
            metavar="N",
            help="Thread blocks of the fused kernel where nothing runs beside it (default: measured at "
            "start, as is where SGLang's own all-reduce and norm are faster).",
        )
        group.add_argument(
            "--tokenweave-reserve",
            action=argparse.BooleanOptionalAction,
            default=ServerArgs.tokenweave_reserve,
            help="Keep matrix products off the kernel's multiprocessors.",
        )
        group.add_argument(
            "--tokenweave-path",
            default=ServerArgs.tokenweave_path,
            help="auto (the first that works), multicast, peer or collective (default: %(default)s).",
        )
        group.add_argument(
            "--tokenweave-barrier-timeout",
            type=float,
            default=ServerArgs.tokenweave_barrier_timeout,
            metavar="SECONDS",
            help="Time after which a barrier of the kernel gives up with a message (default: %(default)s).",
        )
        group.add_argument(
            "--tokenweave-table",
            default=ServerArgs.tokenweave_table,
            metavar="FOLDER",
            help="Folder of tuning tables (default: in the user's cache).",
        )

    @staticmethod
    def _add_ray_args(parser: argparse.ArgumentParser) -> None:
        group = parser.add_argument_group(
            "Ray (sglang_ext)",
            "With --use-ray the ranks are Ray actors: --nnodes is the number of the cluster's nodes to use.",
        )
        group.add_argument(
            "--ray-address",
            default=ServerArgs.ray_address,
            metavar="ADDRESS",
            help="Cluster to join (default: RAY_ADDRESS, else the cluster that runs on this machine, else "
            "with --nnodes 1 a fresh one).",
        )
        group.add_argument(
            "--ray-namespace",
            default=ServerArgs.ray_namespace,
            metavar="NAME",
            help="Ray namespace to join (default: one of our own).",
        )
        group.add_argument(
            "--ray-placement-group",
            default=ServerArgs.ray_placement_group,
            metavar="NAME",
            help="Existing placement group to run in: a bundle per node, one of them on this node (default: "
            "that of the Ray task which runs this program, else a new one).",
        )
        group.add_argument(
            "--ray-env",
            nargs="+",
            default=ServerArgs.ray_env,
            metavar="NAME",
            help="Environment variables that ranks get beside the fixed list (docs/ray.md).",
        )
        group.add_argument(
            "--ray-start-timeout",
            type=float,
            default=ServerArgs.ray_start_timeout,
            metavar="SECONDS",
            help="Time for nodes to be found, and again for ranks to be ready (default: %(default)s).",
        )
        group.add_argument(
            "--ray-on-failure",
            choices=ray_requirements.ON_FAILURE,
            default=ServerArgs.ray_on_failure,
            help="What to do when a rank or a node is lost, after requests in flight got an error: exit with "
            "status 75, or restart all ranks (default: %(default)s).",
        )
        group.add_argument(
            "--ray-max-restarts",
            type=int,
            default=ServerArgs.ray_max_restarts,
            metavar="N",
            help="Restarts in a row before the server gives up (default: %(default)s).",
        )

    def check_server_args(self) -> None:
        """SGLang's checks of a server that is about to start; with Ray ours, and our hooks.

        Raises:
            ValueError: a flag that does not work with ``--use-ray``.
            HookError: a hook is not in place.
        """
        super().check_server_args()
        if self.use_ray:
            self._refuse(ray_requirements.unsupported(self))
        if self.use_ray or "sglang.srt.ray.engine" in sys.modules:  # SGLang's RayEngine in another program
            hooks.install(hooks.Feature.RAY)

    def __post_init__(self) -> None:
        self.enable_llm42 = llm42_mode(self.enable_llm42)
        self._refuse(requirements.nonsense(self) + ray_requirements.nonsense(self))
        TokenWeaveConfig.from_server_args(self)
        if self.enable_tokenweave:
            self._leave_all_reduces_to_tokenweave()
        if self.enable_llm42:
            self._choose_flashinfer()
            self._refuse(requirements.unsupported(self))
        super().__post_init__()
        if self.enable_llm42:
            # Again: SGLang's own resolution may have switched something on, and the model is known now.
            self._refuse(requirements.unsupported(self) + requirements.unsupported_model(self))

    def _choose_flashinfer(self: Any) -> None:
        """For attention on a GPU, where nobody asked for another backend: SGLang's own choice may be one."""
        on_gpu = self.device == "cuda" or (self.device is None and torch.cuda.is_available())
        if on_gpu and self.attention_backend is None:
            self.attention_backend = "flashinfer"

    def _leave_all_reduces_to_tokenweave(self) -> None:
        """Keep SGLang from fusing them with FlashInfer, which it does by itself on some GPUs."""
        if self.flashinfer_allreduce_fusion_backend is not None:
            raise ValueError(
                "--flashinfer-allreduce-fusion-backend does not work with --enable-tokenweave: both fuse the "
                "same all-reduces."
            )
        self.enforce_disable_flashinfer_allreduce_fusion = True

    @staticmethod
    def _refuse(reasons: list[str]) -> None:
        if reasons:
            raise ValueError(" ".join(reasons))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled in another process (scheduler, Ray actor), which need not have loaded our plugin."""
        self.__dict__.update(state)
        hooks.install(hooks.Feature.FLAGS)


#: Kept apart: once our class is in place, SGLang's registry also replaces the name ``SGLangServerArgs`` here.
SGLANG_ADD_CLI_ARGS = ServerArgs.__mro__[1].add_cli_args
