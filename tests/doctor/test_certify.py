"""The certification on a real model in SGLang's own model runner, whole and sabotaged."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sglang_ext.doctor import bench, fallback
from sglang_ext.doctor import certify as certification
from sglang_ext.doctor.certify import CertificationError, certify, certify_quickly
from sglang_ext.llm42 import sampling

pytestmark = pytest.mark.engine

ROWS, SEGMENTS = 8, 3
CONTEXT = 80


@pytest.fixture(scope="module")
def runner(tiny_llama: Path) -> Iterator[Any]:
    """SGLang's model runner on this CPU, with a page size at which prefixes end within pages."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import PortArgs

    from sglang_ext import launch_server, plugin
    from sglang_ext.doctor import worker

    load_plugins()
    plugin.register()
    flags = f"--skip-tokenizer-init --context-length {CONTEXT} --max-total-tokens 512 --page-size 4"
    arguments = ["--model", str(tiny_llama), "--max-running-requests", "8", *flags.split()]
    server_args = launch_server.parse(arguments)
    yield worker.load(server_args, PortArgs.init_new(server_args), 0)
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def make_pass(
    runner: Any,
    attention: Callable[..., Any] | None = None,
    segments: int = SEGMENTS,
    block_rows: int | None = None,
) -> Any:
    """With blocks of fewer rows than a window its attention still has the bits of whole windows."""
    from sglang_ext.llm42.attention import canonical_attention_factory, decode_attention_factory
    from sglang_ext.llm42.canonical_pass import CanonicalPass

    if attention is None and block_rows is not None:
        attention = decode_attention_factory(runner, ROWS)
    attention = attention or canonical_attention_factory(runner)
    return CanonicalPass(runner, segments, ROWS, attention, block_rows=block_rows)


@pytest.fixture
def canonical_pass(runner: Any) -> Any:
    return make_pass(runner)


@pytest.fixture
def sdpa_pass(runner: Any) -> Any:
    """A canonical pass with SGLang's ``torch_native`` attention, which is not row-invariant."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    return make_pass(runner, lambda model_runner, segments, rows: TorchNativeAttnBackend(model_runner))


def patched(monkeypatch: pytest.MonkeyPatch, module: Any, change: Callable[[Any], Any]) -> None:
    """Let ``module`` return ``change`` of what it returned."""
    original = module.forward
    monkeypatch.setattr(module, "forward", lambda *args, **kwargs: change(original(*args, **kwargs)))


def last_row_off(output: Any) -> Any:
    """One unit in the last place more in one element of the last row of the pass."""
    tensor, *rest = output if isinstance(output, tuple) else (output,)
    tensor = tensor.clone()
    tensor[-1, 0] *= 1.01
    return (tensor, *rest) if isinstance(output, tuple) else tensor


def rows_scaled(output: Any) -> Any:
    """Each row off by an amount that depends on its index."""
    tensor, *rest = output if isinstance(output, tuple) else (output,)
    tensor = tensor * (1 + torch.arange(len(tensor))[:, None] / 64).to(tensor.dtype)
    return (tensor, *rest) if isinstance(output, tuple) else tensor


def pools(runner: Any) -> tuple[Any, ...]:
    """Everything that the memory pools consist of."""
    pool, allocator = runner.token_to_kv_pool, runner.token_to_kv_pool_allocator
    return (
        list(runner.req_to_token_pool.free_slots),
        runner.req_to_token_pool.req_to_token.clone(),
        allocator.free_pages.clone(),
        allocator.release_pages.clone(),
        *(buffer.clone() for buffer in (*pool.k_buffer, *pool.v_buffer)),
    )


def same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(first, second, strict=True)
    )


def test_row_invariant_model_passes(runner: Any, canonical_pass: Any) -> None:
    for buffer in runner.token_to_kv_pool.k_buffer:
        buffer.normal_()
    before = pools(runner)
    certificate = certify(canonical_pass)
    assert certificate.passed and certificate.faulty is None
    assert same(before, pools(runner)), "borrowed memory must come back as it was"
    assert {report.operator for report in certificate.operators} == {
        "embedding",
        "norm input_layernorm",
        "linear qkv_proj",
        "rotary",
        "attention",
        "linear o_proj",
        "norm post_attention_layernorm",
        "linear gate_up_proj",
        "activation",
        "linear down_proj",
        "norm norm",
        "lm_head",
        "canonical pass",
        "log-softmax",
        "canonical sampler",
    }
    layers = len(runner.model.model.layers)
    whole, attention = certificate.report_of("canonical pass"), certificate.report_of("attention")
    assert whole is not None and attention is not None
    assert attention.comparisons == layers * whole.comparisons > layers * 500
    assert certificate.length == CONTEXT
    assert any(f"context length {CONTEXT}" in note for note in certificate.notes)
    assert certificate.threads == torch.get_num_threads()
    assert json.loads(certificate.as_json())["passed"] is True
    assert "row invariance: holds" in certificate.as_table()
    quick = certify_quickly(canonical_pass)
    assert quick.fingerprint == certificate.fingerprint
    assert quick.passes == 3
    assert same(before, pools(runner))


def test_fingerprint_is_of_weights_and_shape(
    runner: Any, canonical_pass: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint = certify_quickly(canonical_pass).fingerprint
    assert certify_quickly(make_pass(runner)).fingerprint == fingerprint
    assert len(fingerprint) == 64
    assert certify_quickly(make_pass(runner, segments=2)).fingerprint != fingerprint
    weight = runner.model.model.layers[1].mlp.down_proj.weight
    saved = weight.detach().clone()
    weight.data[3, 5] += 0.5
    changed = certify_quickly(canonical_pass).fingerprint
    weight.data.copy_(saved)
    assert changed != fingerprint
    assert certify_quickly(canonical_pass).fingerprint == fingerprint


@pytest.mark.parametrize("segments", [1, 2, 5])
def test_other_shapes_pass(runner: Any, segments: int) -> None:
    assert certify_quickly(make_pass(runner, segments=segments)).passed


def test_torch_attention_is_found(runner: Any, sdpa_pass: Any) -> None:
    before = pools(runner)
    certificate = certify(sdpa_pass)
    assert not certificate.passed
    assert certificate.faulty == "attention"
    failing = {report.operator for report in certificate.operators if not report.passed}
    assert failing == {"attention", "canonical pass"}
    assert "attention differs first (model.layers." in certificate.conclusion()
    assert same(before, pools(runner))


SABOTAGED = {
    "norm input_layernorm": (lambda model: model.model.layers[1].input_layernorm, rows_scaled),
    "linear gate_up_proj": (lambda model: model.model.layers[0].mlp.gate_up_proj, last_row_off),
    "linear down_proj": (lambda model: model.model.layers[1].mlp.down_proj, last_row_off),
    "activation": (lambda model: model.model.layers[0].mlp.act_fn, rows_scaled),
    "embedding": (lambda model: model.model.embed_tokens, rows_scaled),
    "attention": (lambda model: model.model.layers[1].self_attn.attn, rows_scaled),
}


@pytest.mark.parametrize("operator", SABOTAGED)
def test_sabotaged_operator_is_named_at_server_start(
    runner: Any, canonical_pass: Any, monkeypatch: pytest.MonkeyPatch, operator: str
) -> None:
    module, change = SABOTAGED[operator]
    patched(monkeypatch, module(runner.model), change)
    before = pools(runner)
    with pytest.raises(CertificationError, match=f"--enable-llm42 .* {operator} differs first"):
        certify_quickly(canonical_pass)
    assert same(before, pools(runner))
    certificate = certify(canonical_pass, quick=True)
    failing = {report.operator for report in certificate.operators if not report.passed}
    assert failing <= {operator, "canonical pass"} and operator in failing


def test_arithmetic_outside_of_modules_is_found(
    runner: Any, canonical_pass: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = runner.model.model.layers[0].mlp
    patched(monkeypatch, mlp, rows_scaled)
    certificate = certify(canonical_pass, quick=True)
    assert certificate.faulty == "between modules"
    assert "before model.layers.1.input_layernorm" in certificate.conclusion()


def test_leak_of_nan_is_found(runner: Any, canonical_pass: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that multiplies masked values by zero lets NaN of other requests through."""
    from sglang_ext.cpu import attention

    original = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda *a, guard, **k: original(*a, guard=False, **k))
    certificate = certify(canonical_pass)
    report = certificate.report_of("attention")
    assert certificate.faulty == "attention" and report is not None and report.first is not None
    assert report.first.perturbation == "KV poisoned with NaN"


def test_logits_that_are_no_numbers_are_refused(
    runner: Any, canonical_pass: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have equal bits wherever they stand."""
    patched(monkeypatch, runner.model.model.norm, lambda out: (out[0] * float("nan"), out[1]))
    before = pools(runner)
    with pytest.raises(CertificationError, match="NaN"):
        certify_quickly(canonical_pass)
    assert same(before, pools(runner))


def test_logits_that_are_no_numbers_on_another_rank_are_refused_on_all(
    canonical_pass: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that went on would wait for the one that did not."""
    monkeypatch.setattr(bench, "of_all_ranks", lambda value, group: [value, True])
    with pytest.raises(CertificationError, match="NaN"):
        certify_quickly(canonical_pass)


def test_log_softmax_over_the_batch_is_found(canonical_pass: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sampling.log_softmax
    monkeypatch.setattr(sampling, "log_softmax", lambda logits: original(logits) + logits.float().mean())
    with pytest.raises(CertificationError, match="log-softmax differs first"):
        certify_quickly(canonical_pass)


def test_sampler_over_the_batch_is_found(canonical_pass: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = sampling.sample
    monkeypatch.setattr(
        sampling, "sample", lambda logits, rows, positions: original(logits, rows, positions) + len(rows) % 2
    )
    with pytest.raises(CertificationError, match="canonical sampler differs first"):
        certify_quickly(canonical_pass)


def test_pass_of_random_bits_is_found(
    runner: Any, canonical_pass: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator that gives other bits in each call, at every row."""
    calls = itertools.count()
    patched(monkeypatch, runner.model.model.norm, lambda out: (out[0] * (1 + next(calls) % 7 / 64), out[1]))
    assert certify(canonical_pass, quick=True).faulty == "norm norm"


def test_fallback_is_put_in_place_and_certified(
    runner: Any, canonical_pass: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = runner.model.model.layers[0].mlp.act_fn
    invariant = module.forward
    patched(monkeypatch, module, rows_scaled)
    applied: list[torch.nn.Module] = []

    def apply(model: torch.nn.Module) -> None:
        applied.append(model)
        module.forward = invariant

    row = fallback.Fallback("activation", "cpu", apply, "slower")
    monkeypatch.setattr(fallback, "FALLBACKS", (row,))
    certificate = certify_quickly(canonical_pass)
    assert certificate.passed and applied == [runner.model]
    assert "activation was replaced by a batch-invariant one: slower" in certificate.notes


def test_pools_that_are_too_small_are_named(
    runner: Any, canonical_pass: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocator = runner.token_to_kv_pool_allocator
    monkeypatch.setattr(allocator, "free_pages", allocator.free_pages[:5])
    with pytest.raises(CertificationError, match="--max-total-tokens"):
        certify_quickly(canonical_pass)


def test_few_requests_are_said(runner: Any, canonical_pass: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.req_to_token_pool, "free_slots", [3])
    certificate = certification.certify(canonical_pass, quick=True)
    assert certificate.passed
    assert any("1 of 3 segments" in note for note in certificate.notes)


def make_sizes(runner: Any) -> Any:
    from sglang_ext.llm42.pass_sizes import PassSizes

    return PassSizes(make_pass(runner), [make_pass(runner, segments=size) for size in (1, 2)])


@pytest.mark.parametrize("quick", [True, False])
def test_smaller_passes_are_compared_with_the_full_one(runner: Any, quick: bool) -> None:
    before = pools(runner)
    reports = certification.certify_sizes(make_sizes(runner), quick)
    assert [report.segments for report in reports] == [1, 2]
    assert all(report.passed and report.comparisons >= ROWS for report in reports), reports
    assert same(before, pools(runner))


@pytest.mark.parametrize("quick", [True, False])
def test_smaller_pass_with_other_bits_is_refused(
    runner: Any, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a library splits the inner dimension of a product that has few rows."""
    passes = make_sizes(runner)
    original = runner.model.model.norm.forward

    def few_rows_otherwise(x: torch.Tensor, *rest: Any) -> Any:
        output = original(x, *rest)
        return (output[0] * 1.01, *output[1:]) if len(x) == ROWS else output

    monkeypatch.setattr(runner.model.model.norm, "forward", few_rows_otherwise)
    one, two = certification.certify_sizes(passes, quick)
    assert (one.segments, one.passed, two.passed) == (1, False, True)
    assert one.differences == one.comparisons
    assert "OTHER BITS" in str(one)


def make_steps(runner: Any, *sizes: int) -> list[Any]:
    from sglang_ext.llm42.attention import decode_attention_factory
    from sglang_ext.llm42.canonical_pass import CanonicalPass

    attention = decode_attention_factory(runner, ROWS)
    return [CanonicalPass(runner, size, 1, attention) for size in sizes]


@pytest.mark.parametrize("quick", [True, False])
def test_canonical_decode_steps_are_compared_with_the_full_pass(runner: Any, quick: bool) -> None:
    before = pools(runner)
    steps = make_steps(runner, 4, 24)
    reports = certification.certify_decode(make_pass(runner), steps, quick)
    assert [(report.segments, report.decode) for report in reports] == [(4, True), (24, True)]
    # Every position of the probe, and more.
    assert all(report.passed and report.comparisons > SEGMENTS * ROWS for report in reports), reports
    assert "decode steps of 4 rows: equal bits" in str(reports[0])
    assert same(before, pools(runner))


@pytest.mark.parametrize("quick", [True, False])
def test_canonical_decode_step_with_other_bits_is_refused(
    runner: Any, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = runner.model.model.norm.forward

    def four_rows_otherwise(x: torch.Tensor, *rest: Any) -> Any:
        output = original(x, *rest)
        return (output[0] * 1.01, *output[1:]) if len(x) == 4 else output

    monkeypatch.setattr(runner.model.model.norm, "forward", four_rows_otherwise)
    four, six = certification.certify_decode(make_pass(runner), make_steps(runner, 4, 6), quick)
    assert (four.passed, six.passed) == (False, True)


def test_keys_of_decode_steps_are_compared_by_what_reads_them(
    runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their own logits may be right where the keys that they leave behind are not."""
    from sglang_ext.cpu.backend import CanonicalCpuAttnBackend

    original = CanonicalCpuAttnBackend.forward_extend

    def spoiling(self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, **rest: Any) -> Any:
        output = original(self, q, k, v, layer, batch, **rest)
        if self.rows == 1:
            self.token_to_kv_pool.get_key_buffer(layer.layer_id)[batch.out_cache_loc] *= 1.01
        return output

    monkeypatch.setattr(CanonicalCpuAttnBackend, "forward_extend", spoiling)
    [report] = certification.certify_decode(make_pass(runner), make_steps(runner, 1), quick=True)
    assert not report.passed


def test_no_steps_need_no_memory(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner.req_to_token_pool, "free_slots", [])
    assert certification.certify_decode(make_pass(runner), [], quick=True) == ()


@pytest.mark.parametrize("pages", [14, 18])
def test_decode_steps_are_compared_with_as_many_requests_as_fit(
    runner: Any, monkeypatch: pytest.MonkeyPatch, pages: int
) -> None:
    allocator = runner.token_to_kv_pool_allocator
    full, steps = make_pass(runner, segments=1), make_steps(runner, 8)
    monkeypatch.setattr(allocator, "free_pages", allocator.free_pages[:pages])
    [report] = certification.certify_decode(full, steps, quick=True)
    assert report.passed and report.comparisons > 2


def test_a_size_that_was_not_compared_has_not_passed() -> None:
    assert not certification.SizeReport(2, comparisons=0, differences=0).passed


@pytest.mark.parametrize("quick", [True, False])
def test_passes_of_short_blocks_have_the_bits_of_whole_windows(runner: Any, quick: bool) -> None:
    whole = certification.certify(make_pass(runner), quick)
    blocks = certification.certify(make_pass(runner, block_rows=2), quick)
    assert whole.passed and blocks.passed
    assert whole.fingerprint == blocks.fingerprint


def test_blocks_that_depend_on_their_place_fail(runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places of blocks, not of windows: the second block of a pass computes otherwise."""
    original = runner.model.model.norm.forward

    def second_block_otherwise(x: torch.Tensor, *rest: Any) -> Any:
        output = original(x, *rest)
        output[0][2:4] *= 1.01
        return output

    monkeypatch.setattr(runner.model.model.norm, "forward", second_block_otherwise)
    assert not certification.certify(make_pass(runner, block_rows=2), quick=True).passed


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("block_rows", [None, 2])
def test_logits_of_few_rows_are_compared_with_all(runner: Any, quick: bool, block_rows: int | None) -> None:
    from sglang_ext.llm42.pass_sizes import PassSizes

    before = pools(runner)
    passes = PassSizes(make_pass(runner, block_rows=block_rows))
    [full] = certification.certify_few_rows(passes, quick)
    assert (full.segments, full.few_rows) == (SEGMENTS, 6)
    assert full.passed and full.comparisons >= ROWS
    assert "passes of 3 segments with logits of 6 rows: equal bits" in str(full)
    assert same(before, pools(runner))


@pytest.mark.parametrize("quick", [True, False])
def test_logits_of_few_rows_with_other_bits_are_refused(
    runner: Any, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a library computes a product of few rows in another order."""
    passes = make_sizes(runner)
    few = passes.full.few_rows
    _, *others = certification.certify_few_rows(passes, quick)
    original = runner.model.logits_processor._get_logits

    def few_rows_otherwise(hidden_states: torch.Tensor, *rest: Any, **more: Any) -> Any:
        logits = original(hidden_states, *rest, **more)
        return logits * 1.01 if len(hidden_states) == few else logits

    monkeypatch.setattr(runner.model.logits_processor, "_get_logits", few_rows_otherwise)
    full, *unchanged = certification.certify_few_rows(passes, quick)
    assert not full.passed and full.differences == full.comparisons > 0
    assert unchanged == others


def test_chosen_rows_are_those_of_the_whole_pass(runner: Any) -> None:
    from sglang_ext.llm42.canonical_pass import CandidateTable, PassSegment
    from sglang_ext.llm42.lane import SegmentKind

    canonical_pass = make_pass(runner, block_rows=2)
    table = CandidateTable(2, ROWS, "cpu")
    # Row 0 of SGLang's table is nobody's, and its slots are the padding slot.
    segments = [PassSegment(SegmentKind.PROMPT, 0, 0, list(range(5, 5 + ROWS)), ROWS)]
    everything = canonical_pass.run(segments, table)
    chosen = torch.tensor([ROWS - 1, 0, 2])
    assert torch.equal(canonical_pass.run_few(segments, table, chosen), everything[chosen])
    assert canonical_pass.run_few(segments, table, chosen[:0]).shape == (0, everything.shape[1])
    assert torch.equal(canonical_pass.run(segments, table), everything), "the choice is undone"


def test_a_model_with_no_logits_processor_computes_all_rows() -> None:
    from sglang_ext.llm42.chosen_rows import ChosenRows

    assert ChosenRows.of(torch.nn.Linear(2, 2)) is None and ChosenRows.of(None) is None
