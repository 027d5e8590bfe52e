"""TokenWeave in one SGLang worker: eligibility, choice of path and rule, and the worker's one Weaver."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from sglang_ext.llm42.canonical_scope import in_canonical_pass
from sglang_ext.tokenweave import fused_sizes, paths, table
from sglang_ext.tokenweave.batch import BatchCutError, cut_batch
from sglang_ext.tokenweave.canonical import HalvedAttention
from sglang_ext.tokenweave.communicator import CollectiveCommunicator, Communicator, KernelCommunicator
from sglang_ext.tokenweave.config import TokenWeaveConfig
from sglang_ext.tokenweave.learned_rule import LearnedRule
from sglang_ext.tokenweave.split import GRANULARITY, CommModel, Decision, Gpu, SplitRule, WaveModel
from sglang_ext.tokenweave.trials import DeviceClock
from sglang_ext.tokenweave.tune import is_mixture_of_experts, layer_of_config
from sglang_ext.tokenweave.weaver import Weaver

logger = logging.getLogger(__name__)

_DENSE_MIN_TOKENS = 1024
_EXPERTS_MIN_TOKENS = 2048
#: Largest batch where SGLang does not chunk prompts.
_UNCHUNKED_TOKENS = 16384


@dataclass
class Runtime:
    """The worker's TokenWeave.

    Attributes:
        weaver: runs the decoder stack.
        coordinator: SGLang's tensor-parallel group.
        path: how the fused step moves data, agreed on by all ranks.
        canonical_split: how canonical passes of LLM-42 are cut, "equal" or "never".
        attention_backends: one attention backend per half, each with plans of its own.
        refused: reasons already logged for which a batch was not cut.
    """

    weaver: Weaver
    coordinator: Any
    path: paths.Path
    canonical_split: str = "equal"
    attention_backends: list[Any] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)

    def covers(self, coordinator: Any) -> bool:
        """Whether ``coordinator`` reduces over the ranks of the tensor-parallel group."""
        return coordinator is self.coordinator or coordinator.ranks == self.coordinator.ranks

    def cuts_prefill(self, tokens: int) -> bool:
        """Whether a prefill batch of ``tokens`` would be cut; the same on every rank."""
        return self.weaver.cut_for(tokens) is not None

    def why_canonical_whole(self, segments: int, rows: int) -> str | None:
        """Why canonical passes of ``segments`` segments of ``rows`` rows run whole, None if they are cut.

        Depends on nothing that changes once the first forward pass was observed.
        """
        weaver = self.weaver
        assert weaver.observed, "nothing may be fixed before it is known whether the model can be woven"
        if weaver.stock_reason:
            return weaver.stock_reason
        if self.canonical_split == "never":
            return "--tokenweave-canonical-split never"
        if segments % 2:
            return f"{segments} segments have no equal halves; choose an even --llm42-verify-batch-size"
        if not weaver.communicator.fits(segments * rows):
            return f"{segments * rows} rows do not fit the buffers; raise --chunked-prefill-size"
        return None

    def forward(self, original: Callable[..., Any], bound: inspect.BoundArguments) -> Any:
        """One pass of the decoder stack (``original``), cut in two where the rule says so."""
        arguments = bound.arguments
        batch = arguments["forward_batch"]
        # Models with images give their stack embeddings only.
        tokens = (batch.input_ids if arguments["input_ids"] is None else arguments["input_ids"]).shape[0]
        attention = _attention()
        halves = self._halves(original, bound, batch, tokens, attention) if tokens else None
        if halves is None:
            return self.weaver.run_whole(tokens, lambda: original(*bound.args, **bound.kwargs))
        cut, calls = halves
        output = self.weaver.run_halves(cut, tokens, calls)
        by_rule = not isinstance(attention, HalvedAttention)  # canonical passes are cut by none
        if by_rule and isinstance(self.weaver.decide, LearnedRule) and not _captures_graph():
            self.weaver.decide.observe_launches(self.weaver.launched)
        return output

    def timed(self, batch: Any, forward: Callable[[], Any]) -> Any:
        """One forward pass of the model (``forward``), from whose time the rule learns."""
        rule = self.weaver.decide
        if not isinstance(rule, LearnedRule) or not _is_plain_extend(batch.forward_mode) or _captures_graph():
            return forward()
        woven = self.weaver.statistics.woven
        rule.begin(len(batch.input_ids), sum(int(prefix) for prefix in batch.extend_prefix_lens_cpu))
        output = forward()
        learned = rule.end(self.weaver.statistics.woven > woven)
        if learned and self.weaver.rank == 0:
            logger.info("TokenWeave: %s", learned)
        return output

    def _halves(
        self,
        original: Callable[..., Any],
        bound: inspect.BoundArguments,
        batch: Any,
        tokens: int,
        attention: Any,
    ) -> tuple[int, list[Callable[[], Any]]] | None:
        if isinstance(attention, HalvedAttention):
            return self._canonical_halves(original, bound, batch, attention)
        # SGLang's prefill graphs hold whole batches; those that are cut run outside of them. Of canonical
        # passes only those are cut that were planned so.
        if not _is_plain_extend(batch.forward_mode) or _captures_graph() or in_canonical_pass():
            return None
        cut = self.weaver.cut_for(tokens)
        if cut is None:
            return None
        try:
            pieces = _cut_arguments(bound, cut, tokens, cut_batch(batch, cut))
        except BatchCutError as error:
            self._refuse(str(error))
            return None
        backends = self.attention_backends or [None, None]
        for backend, piece in zip(backends, pieces, strict=True):
            # Both plans are made before either half runs: planning may wait for the device.
            if backend is not None:
                backend.init_forward_metadata(piece.arguments["forward_batch"])
        return cut, self._calls(original, pieces, backends)

    def _canonical_halves(
        self, original: Callable[..., Any], bound: inspect.BoundArguments, batch: Any, attention: Any
    ) -> tuple[int, list[Callable[[], Any]]]:
        """The halves of a canonical pass, whose attention was planned with the pass.

        Raises:
            BatchCutError: it cannot be cut. To run it whole instead would change its bits.
        """
        tokens = 2 * attention.cut
        try:
            pieces = _cut_arguments(bound, attention.cut, tokens, attention.cut_batch(batch))
        except BatchCutError as error:
            raise BatchCutError(
                f"canonical passes of this model cannot be cut in halves: {error}; start with "
                "--tokenweave-canonical-split never"
            ) from error
        return attention.cut, self._calls(original, pieces, attention.backends)

    def _calls(
        self, original: Callable[..., Any], pieces: Sequence[inspect.BoundArguments], backends: Sequence[Any]
    ) -> list[Callable[[], Any]]:
        return [self._half(original, piece, backend) for piece, backend in zip(pieces, backends, strict=True)]

    def _half(
        self, original: Callable[..., Any], piece: inspect.BoundArguments, backend: Any
    ) -> Callable[[], Any]:
        """A half as a call, with ``backend`` as its attention or SGLang's own if None."""
        from sglang.srt.model_executor.forward_context import get_forward_context, set_forward_context

        context = get_forward_context()
        if backend is not None:
            context = replace(context, attn_backend=backend)

        def run() -> Any:
            set_forward_context(context)
            return original(*piece.args, **piece.kwargs)

        return run

    def _refuse(self, reason: str) -> None:
        if reason not in self.refused:
            self.refused.add(reason)
            logger.info("TokenWeave does not cut batches of this kind: %s", reason)


_runtime: Runtime | None = None


def current() -> Runtime | None:
    """This worker's runtime, or None where TokenWeave is off."""
    return _runtime


def start(model_runner: Any) -> Runtime | None:
    """Set TokenWeave up for a worker whose model has just been loaded; None if it runs stock.

    Raises:
        sglang_ext.tokenweave.paths.PathError: the path asked for cannot be used, or the ranks differ.
        ValueError: a flag is out of range.
    """
    global _runtime
    from sglang.srt.distributed import get_tp_group

    config = TokenWeaveConfig.from_server_args(model_runner.server_args)
    if not config.enabled or model_runner.is_draft_worker:
        return None
    coordinator = get_tp_group()
    if reason := stock_reason(model_runner.server_args) or stack_reason(decoder_stack(model_runner.model)):
        if coordinator.rank_in_group == 0:
            logger.warning("TokenWeave is off: %s; SGLang runs stock", reason)
        return None
    path = _choose_path(config, model_runner, coordinator)
    decide = _rule(config, path, model_runner, coordinator)
    sizes = range(GRANULARITY, _largest_batch(model_runner) + 1, GRANULARITY)
    predict = decide.predicted if isinstance(decide, LearnedRule) else decide
    paths.agree_on_cuts([predict(tokens).cut for tokens in sizes], coordinator.cpu_group)
    hidden = model_runner.model_config.hidden_size
    communicator = _communicator(config, path, model_runner, coordinator)
    weaver = Weaver(
        rank=coordinator.rank_in_group,
        world=coordinator.world_size,
        hidden=hidden,
        communicator=communicator,
        decide=decide,
        save_state=save_sglang_state,
        fuse_whole=_fuse_whole(communicator, model_runner.device),
        poison_residual=config.poison_residual,
    )
    _runtime = Runtime(weaver, coordinator, path, config.canonical_split)
    return _runtime


def running_half() -> int | None:
    """The half (0 or 1) of which the caller computes a part; None outside of woven passes."""
    return None if _runtime is None else _runtime.weaver.running_half


def stop() -> None:
    """Forget this worker's runtime."""
    global _runtime
    _runtime = None


def stock_reason(server_args: Any) -> str | None:
    """Why this server's configuration cannot be woven, or None if it can."""
    refusals = {
        "there is only one tensor-parallel rank": server_args.tp_size == 1,
        "pipeline parallelism passes residuals between stages": server_args.pp_size > 1,
        "DP attention divides the tokens between ranks": server_args.enable_dp_attention,
        "--enable-two-batch-overlap cuts batches itself": server_args.enable_two_batch_overlap,
        "--enable-torch-compile traces the model": server_args.enable_torch_compile,
        "LoRA adapters are laid out for whole batches": server_args.enable_lora or server_args.lora_paths,
    }
    return next((reason for reason, applies in refusals.items() if applies), None)


def decoder_stack(model: torch.nn.Module) -> torch.nn.Module | None:
    """The module that owns the decoder layers, behind whatever wrappers; None if there is none."""
    from sglang.srt.model_executor.runner.prefill_cuda_graph_runner import _resolve_transformer_layer_model

    try:
        return _resolve_transformer_layer_model(model)
    except RuntimeError:
        return None


def stack_reason(stack: torch.nn.Module | None) -> str | None:
    """Why a model's decoder stack cannot be run in halves, or None if it can."""
    if stack is None:
        return "the model has no decoder stack"
    missing = {"input_ids", "positions", "forward_batch"} - set(inspect.signature(stack.forward).parameters)
    return f"the model's decoder stack does not take {', '.join(sorted(missing))}" if missing else None


def save_sglang_state() -> Callable[[], None]:
    """Save what SGLang keeps in globals during a forward pass; returns what puts it back."""
    from sglang.srt.model_executor import forward_context
    from sglang.srt.runtime_context import get_forward

    context, flags = forward_context._current, get_forward()._plain
    saved = dict(flags)

    def restore() -> None:
        forward_context.set_forward_context(context)
        flags.update(saved)

    return restore


def _captures_graph() -> bool:
    """Whether this forward pass, or its warm-up, belongs to the capture of a graph."""
    from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode

    return bool(get_is_capture_mode()) or (
        torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    )


def _attention() -> Any:
    from sglang.srt.model_executor.forward_context import get_attn_backend, has_forward_context

    return get_attn_backend() if has_forward_context() else None


def _is_plain_extend(mode: Any) -> bool:
    return bool(mode.is_extend() and not mode.is_target_verify() and not mode.is_draft_extend_v2())


def _slice_arguments(bound: inspect.BoundArguments, rows: slice) -> inspect.BoundArguments:
    """The arguments of the decoder stack for ``rows`` (the batch itself is replaced by the caller).

    Raises:
        BatchCutError: an argument other than the known ones is given.
    """
    piece = inspect.BoundArguments(bound.signature, bound.arguments.copy())
    for name, value in bound.arguments.items():
        if value is None or name == "forward_batch":
            continue
        if name in ("input_ids", "input_embeds"):
            piece.arguments[name] = value[rows]
        elif name == "positions":
            # Multimodal rotary positions are [3, tokens].
            piece.arguments[name] = value[..., rows]
        elif not (name in ("args", "kwargs") and not value):
            raise BatchCutError(f"the decoder stack was given {name}")
    return piece


def _cut_arguments(
    bound: inspect.BoundArguments, cut: int, tokens: int, batches: tuple[Any, Any]
) -> list[inspect.BoundArguments]:
    """The decoder stack's arguments for both halves, with the ``batches`` of these."""
    pieces = [_slice_arguments(bound, rows) for rows in (slice(0, cut), slice(cut, tokens))]
    for piece, batch in zip(pieces, batches, strict=True):
        piece.arguments["forward_batch"] = batch
    return pieces


def _choose_path(config: TokenWeaveConfig, model_runner: Any, coordinator: Any) -> paths.Path:
    device, problem = torch.device(model_runner.device), None
    if model_runner.server_args.nnodes > 1:
        problem = "the ranks are not all on one node"
    elif device.type == "cuda":
        device = torch.device("cuda", model_runner.gpu_id)
        problem = paths.peer_problem(device, coordinator.cpu_group)
    capabilities = paths.probe(
        coordinator.world_size, device, model_runner.model_config.hidden_size, model_runner.dtype, problem
    )
    choice = paths.choose(config.path, capabilities)
    paths.agree(choice, coordinator.cpu_group)
    return choice.path


def _largest_batch(model_runner: Any) -> int:
    """Tokens of the largest prefill batch."""
    return max(model_runner.server_args.chunked_prefill_size or 0, 0) or _UNCHUNKED_TOKENS


def _communicator(
    config: TokenWeaveConfig, path: paths.Path, model_runner: Any, coordinator: Any
) -> Communicator:
    device = coordinator.device
    if path is paths.Path.COLLECTIVE:
        return CollectiveCommunicator(coordinator.device_group, torch.device(model_runner.device))
    from sglang_ext.tokenweave.symmetric import symmetric_ranks

    max_tokens, hidden = _largest_batch(model_runner), model_runner.model_config.hidden_size
    buffers = symmetric_ranks(
        coordinator.cpu_group,
        2 * max_tokens,
        hidden,
        model_runner.dtype,
        device,
        multicast=path is paths.Path.MULTICAST,
    )
    communicator = KernelCommunicator(
        buffers,
        max_tokens,
        coordinator.device_group,
        config.ctas,
        fused_sizes.always(config.fused_ctas or fused_sizes.DEFAULT_CTAS),
        config.barrier_timeout,
        config.reserve,
    )
    if config.fused_ctas is None and not _fixed_kernels(model_runner.server_args):
        communicator.fused, times = fused_sizes.measure(
            communicator, coordinator, hidden, model_runner.dtype, max_tokens
        )
        if coordinator.rank_in_group == 0:
            logger.info("TokenWeave: all-reduce and norm of batches that are not cut: %s", times)
    return communicator


def _fixed_kernels(server_args: Any) -> bool:
    """Whether no measurement may choose: all rows are to be summed alike, or SGLang's own sums are others."""
    return bool(server_args.enable_deterministic_inference or server_args.enable_symm_mem)


def _fuse_whole(communicator: Communicator, device: str) -> Callable[[int], bool]:
    """Which batches that are not cut take the fused step."""
    if not isinstance(communicator, KernelCommunicator):
        return lambda tokens: device == "cpu"  # out of NCCL's calls it is slower than SGLang's
    # What is faster may be another thing at the next start; the bits of canonical passes may not.
    return lambda tokens: in_canonical_pass() or communicator.fused.at(tokens) > 0


def _rule(
    config: TokenWeaveConfig, path: paths.Path, model_runner: Any, coordinator: Any
) -> Callable[[int], Decision]:
    """The rule that chooses the cut, logged once with what it rests on."""
    model = model_runner.model_config.hf_text_config.to_dict()
    experts = is_mixture_of_experts(model)
    minimum = config.min_tokens or (_EXPERTS_MIN_TOKENS if experts else _DENSE_MIN_TOKENS)
    if config.split == "never":
        return lambda tokens: _whole(tokens, "--tokenweave-split never")
    if config.split.isdecimal():
        return lambda tokens: _at(tokens, int(config.split), minimum)
    if config.split == "equal" or model_runner.device != "cuda":
        return lambda tokens: _at(tokens, tokens // 2, minimum)
    shape = layer_of_config(model, coordinator.world_size)
    dtype = str(model_runner.dtype).removeprefix("torch.")
    properties = torch.cuda.get_device_properties(model_runner.gpu_id)
    stored = table.load(
        config.table or table.default_folder(), table.shape_key(shape, dtype), properties.name
    )
    if stored is not None and not experts:
        basis = f"tuning table of {stored.gpu}"
        rule = SplitRule(
            stored.beside(), stored.alone(), stored.comm or CommModel(), shape.hidden, min_tokens=minimum
        )
    else:
        basis = "wave model"
        gpu = Gpu(properties.multi_processor_count, 6e6 * properties.multi_processor_count)
        rule = SplitRule(
            WaveModel(shape, gpu, reserved=config.ctas),
            WaveModel(shape, gpu),
            CommModel(),
            shape.hidden,
            min_tokens=minimum,
        )
    if coordinator.rank_in_group == 0:
        logger.info("TokenWeave cuts batches by the %s, from %d tokens, path %s", basis, minimum, path.value)
    return LearnedRule(
        rule, lambda time: fused_sizes.slowest([time], coordinator.cpu_group)[0], DeviceClock()
    )


def _whole(tokens: int, reason: str) -> Decision:
    return Decision(tokens, None, float("inf"), 0.0, reason)


def _at(tokens: int, cut: int, minimum: int) -> Decision:
    if tokens < minimum:
        return _whole(tokens, f"{tokens} tokens are fewer than the threshold of {minimum}")
    if not 0 < cut < tokens:
        return _whole(tokens, f"{tokens} tokens cannot be cut at {cut}")
    return Decision(tokens, cut, 0.0, 0.0, f"cut at {cut} of {tokens}")
