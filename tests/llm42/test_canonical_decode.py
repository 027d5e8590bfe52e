"""When a decode step is canonical, which rows decide in it, and what its pass is given."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sglang_ext.llm42 import canonical_decode
from sglang_ext.llm42.canonical_decode import CanonicalDecode, canonical_decode_for
from sglang_ext.llm42.canonical_pass import CanonicalPass
from sglang_ext.llm42.config import Llm42Config
from sglang_ext.llm42.decode_policy import DecodeMode, DecodePolicy
from sglang_ext.llm42.drafting import DecodeStep
from sglang_ext.llm42.lane import LaneRequest
from sglang_ext.llm42.request import DeterministicRequest
from sglang_ext.llm42.runtime import Runtime, _Row


class FakePass:
    """Says what it was given."""

    def __init__(self, segments: int) -> None:
        self.segments = segments

    def run_rows(self, batch: Any, positions: Sequence[int]) -> Any:
        return self.segments, batch, list(positions)


def decode(*sizes: int, always: bool = True) -> CanonicalDecode:
    made = CanonicalDecode([cast("Any", FakePass(size)) for size in sizes], DecodePolicy(always))
    made.allow(sizes)
    return made


def row(kind: str, **req: Any) -> _Row:
    """A request of a batch: unmarked, settled, drafted (with candidates), prompt, penalised."""
    fields = {"return_hidden_states": False, "multimodal_inputs": None, "kv_committed_len": 30, **req}
    fields["finished"] = lambda: False
    if kind == "unmarked":
        return _Row.of(cast("Any", SimpleNamespace(**fields, llm42=None)))
    fields["kv_committed_len"] = 4
    lane = LaneRequest(known_end=4, max_end=40, canonical_end=0)
    state = DeterministicRequest(seed=1, seed_is_default=True, lane=lane, decidable=kind != "penalised")
    if kind != "prompt":
        lane.prompt_planned(4)
        lane.prompt_done(4)
    if kind in ("drafted", "penalised"):
        lane.drafted()
    return _Row.of(cast("Any", SimpleNamespace(**fields, llm42=state)))


def runtime(*sizes: int, always: bool = True) -> Any:
    """As much of a runtime as looks at rows."""
    made = object.__new__(Runtime)
    made.canonical_decode = decode(*sizes, always=always)
    made._capacity = 8
    return made


KINDS = ("unmarked", "settled", "drafted", "prompt", "penalised")


def test_rows_that_a_step_could_decide_are_counted() -> None:
    rows = [row(kind) for kind in KINDS]
    counted: list[tuple[int, int, int, int]] = []
    made = runtime(8)
    choose = made.canonical_decode.policy.choose
    made.canonical_decode.policy.choose = lambda *counts: counted.append(counts) or choose(*counts)
    assert made._choose_size(rows) == 8
    # The settled one, and the one whose candidates would be verified first.
    assert counted == [(5, 2, 30, 30 + 4 * 4)]
    assert runtime(8, always=False)._choose_size(rows) is None
    finished = row("settled")
    finished.req.finished = lambda: True  # type: ignore[method-assign]
    assert runtime(8)._choose_size([_Row.of(finished.req), row("unmarked")]) is None


@pytest.mark.parametrize("wants", [{"return_hidden_states": True}, {"multimodal_inputs": object()}])
def test_what_an_unmarked_request_needs_of_sglangs_forward(wants: dict[str, Any]) -> None:
    rows = [row("settled"), row("settled")]
    assert runtime(8)._choose_size([*rows, row("unmarked")]) == 8
    assert runtime(8)._choose_size([*rows, row("unmarked", **wants)]) is None


def _placed(size: int | None) -> DecodeStep:
    rows = [row(kind) for kind in KINDS]
    step = DecodeStep([each.req for each in rows], [0] * len(rows), [], [], size)
    for number, each in enumerate(rows):
        runtime(8)._place(step, number, each)
    step.urgent = [bool(each.lane and each.lane.urgent) for each in rows]  # type: ignore[attr-defined]
    return step


def test_settled_rows_decide_and_others_draft_until_they_are_verified() -> None:
    step: Any = _placed(8)
    assert [KINDS[number] for number in step.deciding] == ["settled"]
    assert [KINDS[number] for number in step.drafting] == ["settled", "drafted", "penalised"]
    assert [KINDS[number] for number in step.idle] == ["prompt"]
    assert step.positions == [30, 4, 5, 0, 5]
    assert not any(step.urgent)


@pytest.mark.parametrize(("size", "waits"), [(8, True), (None, False)])
def test_a_row_waits_while_its_candidates_are_verified(size: int | None, waits: bool) -> None:
    each = row("drafted")
    assert each.lane is not None
    each.lane.verify_planned(1)
    step = DecodeStep([each.req], [0], [], [], size)
    runtime(8)._place(step, 0, each)
    assert (step.idle == [0]) == waits and not step.deciding and not each.lane.urgent


class FakeVerification:
    """Notes launches; a pass takes what is urgent."""

    def __init__(self, under_way: object = None) -> None:
        self.under_way = under_way
        self.launched: list[LaneRequest] = []

    def launch(self, requests: dict[LaneRequest, Any], step: int, can_decode: bool) -> None:
        self.launched = [lane for lane in requests if lane.urgent]
        for lane in self.launched:
            lane.verify_planned(lane.pending)
        self.under_way = object()


@pytest.mark.parametrize(
    ("size", "under_way", "launched"), [(8, None, ["drafted"]), (8, "a pass", []), (None, None, [])]
)
def test_candidates_of_rows_that_may_decide_are_verified_first(
    monkeypatch: pytest.MonkeyPatch, size: int | None, under_way: object, launched: list[str]
) -> None:
    """A row that drafted beside the launch of its pass would never be settled."""
    made, rows = runtime(8), [row(kind) for kind in KINDS]
    made._requests = {each.lane: each.req for each in rows if each.lane is not None}
    made._step_number = 1
    made.verification = FakeVerification(under_way)  # type: ignore[assignment]
    step = DecodeStep([each.req for each in rows], [0] * len(rows), [], [], size)
    waited: list[object] = []
    made._forward_stream = "forward stream"
    preparing = SimpleNamespace(
        wait_stream=lambda stream: waited.append((stream, made.verification.under_way))
    )
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: preparing)
    made._settle(step, rows)
    # SGLang prepares a step on another stream than that on which the one before may still run.
    assert waited == [("forward stream", None)] * bool(launched)
    taken = made.verification.launched  # type: ignore[attr-defined]
    assert [kind for kind, each in zip(KINDS, rows, strict=True) if each.lane in taken] == launched
    for number, each in enumerate(rows):
        made._place(step, number, each)
    assert ("drafted" in [KINDS[number] for number in step.idle]) == bool(launched)


def test_in_sglangs_steps_all_draft() -> None:
    step: Any = _placed(None)
    assert [KINDS[number] for number in step.drafting] == ["settled", "drafted", "penalised"]
    assert not step.deciding and not any(step.urgent)


def test_sizes_that_do_not_exist_cannot_be_allowed() -> None:
    steps = decode(4, 8)
    with pytest.raises(ValueError, match=r"no canonical decode step of \[6\] rows, only of \[4, 8\]"):
        steps.allow([4, 6])
    assert steps.policy.sizes == (4, 8)
    steps.allow([8])
    assert steps.policy.choose(2, 2) == 8


def test_a_step_runs_in_the_shape_that_was_chosen() -> None:
    logits = decode(4, 8).forward(8, cast("Any", "batch"), [5, 0]).next_token_logits
    assert logits == (8, "batch", [5, 0])


@pytest.mark.parametrize(
    ("device", "mode", "most", "there"),
    [
        ("cuda", DecodeMode.AUTO, 64, True),
        ("cuda", DecodeMode.AUTO, 8, False),
        ("cuda", DecodeMode.ALWAYS, 2, True),
        ("cuda", DecodeMode.NEVER, 500, False),
        ("cpu", DecodeMode.AUTO, 500, False),
        ("cpu", DecodeMode.ALWAYS, 2, True),
    ],
)
def test_which_servers_have_such_steps(
    monkeypatch: pytest.MonkeyPatch, device: str, mode: DecodeMode, most: int, there: bool
) -> None:
    monkeypatch.setattr(
        canonical_decode, "_passes", lambda runner, sizes, *rest: [FakePass(s) for s in sizes]
    )
    monkeypatch.setattr(canonical_decode, "decode_attention_factory", lambda *arguments: None)
    monkeypatch.setattr(canonical_decode, "_all_have_room", lambda *arguments: True)
    runner: Any = SimpleNamespace(device=device, max_running_requests=most)
    made = canonical_decode_for(runner, Llm42Config(16, 4, 4, canonical_decode=mode))
    assert (made is not None) == there
    if made is not None:
        assert max(made.passes) >= most
        made.allow(made.passes)
        assert (made.policy.choose(most, 1) is not None) == (mode is DecodeMode.ALWAYS)


@pytest.mark.parametrize(("free_gib", "there"), [(5.0, True), (1.2, False)])
def test_without_memory_a_server_verifies(
    monkeypatch: pytest.MonkeyPatch, free_gib: float, there: bool
) -> None:
    monkeypatch.setattr(
        canonical_decode, "_passes", lambda runner, sizes, *rest: [FakePass(s) for s in sizes]
    )
    monkeypatch.setattr(canonical_decode, "decode_attention_factory", lambda *arguments: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free_gib * 2**30), 0))
    runner: Any = SimpleNamespace(
        device="cuda",
        max_running_requests=256,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(1, 131_072, dtype=torch.int32)),
        model_config=SimpleNamespace(vocab_size=128_256),
    )
    assert (canonical_decode_for(runner, Llm42Config(32, 32, 4)) is not None) == there


def test_not_with_tokenweave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(canonical_decode.tokenweave, "current", lambda: object())
    runner: Any = SimpleNamespace(device="cuda", max_running_requests=256)
    assert canonical_decode_for(runner, Llm42Config(16, 4, 4, canonical_decode=DecodeMode.ALWAYS)) is None


def _pass(segments: int, rows: int = 1) -> CanonicalPass:
    runner: Any = SimpleNamespace(
        device="cpu",
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(9, 50, dtype=torch.int32)),
        model_config=SimpleNamespace(context_len=50),
        spec_algorithm=None,
    )
    return CanonicalPass(runner, segments, rows, cast("Any", lambda *arguments: None))


def test_a_decode_batch_becomes_a_pass_of_single_rows() -> None:
    # The second row is idle: position 0, padding slot.
    batch: Any = SimpleNamespace(
        input_ids=torch.tensor([11, 0, 13], dtype=torch.int32),
        req_pool_indices=torch.tensor([4, 5, 6]),
        seq_lens=torch.tensor([8, 1, 31]),
        out_cache_loc=torch.tensor([104, 0, 106]),
    )
    made = _pass(5).batch_of_rows(batch, [7, 0, 30])
    assert made.input_ids.tolist() == [11, 0, 13, 0, 0]
    assert made.req_pool_indices.tolist() == [4, 5, 6, 0, 0]
    assert made.positions.tolist() == made.extend_prefix_lens.tolist() == [7, 0, 30, 0, 0]
    assert made.extend_prefix_lens_cpu == [7, 0, 30, 0, 0]
    assert made.seq_lens.tolist() == made.seq_lens_cpu.tolist() == [8, 1, 31, 1, 1]
    assert made.out_cache_loc.tolist() == [104, 0, 106, 0, 0]
    assert made.batch_size == made.extend_num_tokens == 5


@pytest.mark.parametrize(("segments", "rows"), [(2, 1), (5, 2)])
def test_rows_must_fit(segments: int, rows: int) -> None:
    with pytest.raises(ValueError, match="3 rows do not fit"):
        _pass(segments, rows).batch_of_rows(cast("Any", None), [1, 2, 3])
