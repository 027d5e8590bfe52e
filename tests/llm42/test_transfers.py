"""What travels from the host to the device in a decode step and in a pass: right values, few copies."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sglang_ext.llm42 import canonical_pass, drafting, logit_processing, marked_rows, sampling, verification
from sglang_ext.llm42.canonical_pass import CandidateTable, CanonicalPass, PassSegment
from sglang_ext.llm42.drafting import DecodeStep, Drafting
from sglang_ext.llm42.lane import LaneRequest, SegmentKind, first_rows
from sglang_ext.llm42.logit_processing import RequestRows
from sglang_ext.llm42.request import DeterministicRequest
from sglang_ext.llm42.sampling import RowParams, SamplingRows
from sglang_ext.llm42.transfer import to_device
from sglang_ext.llm42.verification import consecutive_rows

POOL, VOCABULARY, CAPACITY = 20, 50, 8


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Everything that was sent, and only by ``to_device``: ``torch.tensor`` would wait for the device."""
    sent: list[Any] = []
    made = torch.tensor

    def counting(values: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        sent.append(values)
        with monkeypatch.context() as within:
            within.setattr(torch, "tensor", made)
            return to_device(values, *args, **kwargs)

    def on_host(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        assert device is None, "a copy that a GPU would wait for"
        return made(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", on_host)
    for module in (canonical_pass, drafting, logit_processing, sampling, verification):
        monkeypatch.setattr(module, "to_device", counting)
    return sent


def _request(pool: int, marked: bool = True, temperature: float = 0.0, **more: Any) -> Any:
    params = SimpleNamespace(
        temperature=temperature,
        top_k=-1,
        top_p=0.9,
        min_p=0.0,
        frequency_penalty=more.pop("frequency_penalty", 0.0),
        presence_penalty=more.pop("presence_penalty", 0.0),
        repetition_penalty=more.pop("repetition_penalty", 1.0),
        min_new_tokens=more.pop("min_new_tokens", 0),
        stop_token_ids=more.pop("stop_token_ids", None),
        logit_bias=more.pop("logit_bias", None),
    )
    assert not more, more
    state = None
    if marked:
        lane = LaneRequest(known_end=4, max_end=40, canonical_end=0)
        lane.prompt_planned(4)
        lane.prompt_done(4)
        state = DeterministicRequest(seed=pool, seed_is_default=False, lane=lane)
    return SimpleNamespace(
        req_pool_idx=pool,
        llm42=state,
        sampling_params=params,
        grammar=None,
        custom_logit_processor=None,
        tokenizer=None,
    )


@pytest.fixture
def engine() -> Drafting:
    """Decode steps without a model."""
    return Drafting(CandidateTable(POOL, CAPACITY, "cpu"), "cpu", torch.float32)


def _step(engine: Drafting) -> tuple[DecodeStep, Any]:
    """Rows 0 and 3 unmarked, 1, 4 and 5 drafting at positions 4, 5 and 6, 2 idle."""
    reqs = [
        _request(11, marked=False),
        _request(12),
        _request(13),
        _request(14, marked=False),
        _request(15, temperature=0.7),
        _request(16),
    ]
    step = DecodeStep(reqs, [9, 4, 0, 9, 5, 6], [1, 4, 5], [2])
    for pool, position, token in ((12, 4, 31), (15, 5, 32), (16, 6, 33)):
        engine._table.write(torch.tensor([pool]), torch.tensor([position]), torch.tensor([token]))
    return step, SimpleNamespace(input_ids=torch.tensor([40, 41, 42, 43, 44, 45], dtype=torch.int32))


def _sampled(engine: Drafting, step: DecodeStep) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the step (before SGLang's sampler changes them), and the tokens of its rows."""
    logits = torch.randn(6, VOCABULARY, generator=torch.Generator().manual_seed(0))
    before = logits.clone()

    def of_sglang() -> torch.Tensor:
        engine.level_marked_rows(logits)
        assert logits[[1, 2, 4, 5]].eq(0).all() and torch.equal(logits[[0, 3]], before[[0, 3]])
        return torch.tensor([7, 7, 7, 7, 7, 7])

    return before, engine.sample(cast("Any", SimpleNamespace(next_token_logits=logits)), of_sglang)


def _expected(logits: torch.Tensor, step: DecodeStep, row: int) -> int:
    params = step.reqs[row].sampling_params
    one = RowParams(params.temperature, params.top_k, params.top_p, params.min_p, step.reqs[row].req_pool_idx)
    position = torch.tensor([step.positions[row] + 1])
    return int(sampling.sample(logits[row : row + 1], SamplingRows.from_params([one]), position))


def test_a_decode_step_feeds_and_keeps_candidates_in_three_copies(
    engine: Drafting, copies: list[Any]
) -> None:
    step, batch = _step(engine)
    given = batch.input_ids
    engine.feed(step, batch)
    assert batch.input_ids.tolist() == [40, 31, 0, 43, 32, 33]
    assert given.tolist() == [40, 41, 42, 43, 44, 45], "SGLang's own tensor must stay as it is"
    logits, token_ids = _sampled(engine, step)
    assert len(copies) == 3
    expected = {row: _expected(logits, step, row) for row in (1, 4, 5)}
    assert token_ids.tolist() == [7, expected[1], 7, 7, expected[4], expected[5]]
    for row, position in ((1, 5), (4, 6), (5, 7)):
        pool = torch.tensor([step.reqs[row].req_pool_idx])
        assert engine._table.read(pool, torch.tensor([position])).item() == expected[row]
        assert step.reqs[row].llm42.lane.pending == 1


def test_sampling_parameters_travel_once_while_the_same_rows_decode(
    engine: Drafting, copies: list[Any]
) -> None:
    reqs = [_request(12), _request(15, temperature=0.7)]
    first = engine._decode_rows(reqs)
    sent = len(copies)
    assert engine._decode_rows(list(reqs)) is first and len(copies) == sent
    for others in (reqs[::-1], reqs[:1], [*reqs, _request(16)], [reqs[0], _request(17, temperature=0.7)]):
        rows = engine._decode_rows(others)
        assert rows is not first
        assert rows.seed.tolist() == [req.req_pool_idx for req in others], "each request's own seed"
        assert rows.greedy.tolist() == [req.sampling_params.temperature == 0 for req in others]


def test_a_request_that_ended_before_sampling_drafts_nothing(engine: Drafting) -> None:
    step, batch = _step(engine)
    engine.feed(step, batch)
    step.reqs[1].llm42.lane = None
    logits, token_ids = _sampled(engine, step)
    assert step.drafted == [4, 5]
    assert token_ids.tolist() == [7, 7, 7, 7, _expected(logits, step, 4), _expected(logits, step, 5)]
    assert engine._table.read(torch.tensor([12]), torch.tensor([5])).item() == 0
    assert engine._table.read(torch.tensor([16]), torch.tensor([7])).item() == _expected(logits, step, 5)


def test_a_batch_without_marked_rows_sends_nothing(engine: Drafting, copies: list[Any]) -> None:
    step = DecodeStep([_request(11, marked=False)], [9], [], [])
    batch: Any = SimpleNamespace(input_ids=torch.tensor([40]))
    engine.feed(step, batch)
    logits = torch.ones(1, VOCABULARY)

    def of_sglang() -> torch.Tensor:
        engine.level_marked_rows(logits)
        return torch.tensor([7])

    engine.sample(cast("Any", SimpleNamespace(next_token_logits=logits)), of_sglang)
    assert batch.input_ids.tolist() == [40] and logits.eq(1).all() and copies == []


@pytest.mark.parametrize(
    ("firsts", "counts"),
    [
        ([], []),
        ([(0, 5, 3)], [1]),
        ([(3, 8, 3), (8, 100, 7), (40, 1, 2)], [1, 4, 3]),
    ],
)
def test_rows_of_segments_follow_each_other(
    firsts: Sequence[tuple[int, int, int]], counts: Sequence[int]
) -> None:
    found = consecutive_rows(firsts, counts)
    expected = [
        (row + i, position + i, pool)
        for (row, position, pool), count in zip(firsts, counts, strict=True)
        for i in range(count)
    ]
    assert found.shape == (3, len(expected)) and found.dtype == torch.int64
    assert [tuple(row) for row in found.T.tolist()] == expected


PENALISED: list[dict[str, Any]] = [
    {"frequency_penalty": 0.5, "presence_penalty": 0.25},
    {"repetition_penalty": 1.5, "logit_bias": {"3": 1.5}},
    {"min_new_tokens": 5, "stop_token_ids": {7, 8}},
    {"repetition_penalty": 0.8, "min_new_tokens": 4, "stop_token_ids": {9}},
]


def _decoded(pool: int, decided: list[int], **more: Any) -> Any:
    req = _request(pool, **more)
    req.llm42.decided = array("q", decided)
    return req


def test_a_decode_step_of_penalised_rows_takes_one_copy_more(engine: Drafting, copies: list[Any]) -> None:
    step, batch = _step(engine)
    for row, more in zip((1, 4, 5), PENALISED, strict=False):
        pool = step.reqs[row].req_pool_idx
        step.reqs[row] = _decoded(pool, [1, 2, 2], **more)
    engine.feed(step, batch)
    _sampled(engine, step)
    assert len(copies) == 4


@pytest.mark.parametrize("decided", [[], [1, 2, 2, 30]])
def test_rows_of_a_pass_are_penalised_alike_in_one_copy(
    engine: Drafting, copies: list[Any], decided: list[int]
) -> None:
    """Each verified row as if the request had ended before it; a neighbour without penalties stays alone."""
    reqs = [_decoded(12 + number, decided, **more) for number, more in enumerate(PENALISED)]
    candidates = [31, 2, 31]
    for req in reqs:
        for position, token in enumerate(candidates, req.llm42.lane.known_end + 1):
            pool = torch.tensor([req.req_pool_idx])
            engine._table.write(pool, torch.tensor([position]), torch.tensor([token]))
    rows = [*((req, earlier) for req in reqs for earlier in range(4)), (_request(17), 0), (reqs[0], 2)]
    logits = torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(0))
    found = marked_rows.process(
        logits.clone(), [req for req, _ in rows], [earlier for _, earlier in rows], engine._table
    )
    assert len(copies) == 1
    for row, (req, earlier) in enumerate(rows):
        expected, params = logits[row].clone(), req.sampling_params
        output = [*req.llm42.decided, *candidates[:earlier]]
        for token in set(output):
            expected[token] -= params.frequency_penalty * output.count(token)
            expected[token] -= params.presence_penalty
            scale = params.repetition_penalty
            expected[token] *= scale if expected[token] < 0 else 1 / scale
        for token in (params.stop_token_ids or ()) if len(output) < params.min_new_tokens else ():
            expected[token] = float("-inf")
        for token, bias in (params.logit_bias or {}).items():
            expected[int(token)] += bias
        torch.testing.assert_close(found[row], expected)


def test_stop_tokens_are_looked_up_once(engine: Drafting, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up: list[Any] = []
    original = logit_processing.stop_tokens
    monkeypatch.setattr(logit_processing, "stop_tokens", lambda req: looked_up.append(req) or original(req))
    reqs = [_decoded(12 + number, [1], **more) for number, more in enumerate(PENALISED)]
    for earlier in (0, 1, 2):
        marked_rows.process(torch.zeros(len(reqs), VOCABULARY), reqs, [earlier] * len(reqs), engine._table)
    assert looked_up == reqs


CROWD = [
    RowParams(temperature=0.0),
    RowParams(temperature=0.7, top_k=5, seed=-(2**63)),
    RowParams(temperature=1.3, min_p=0.1, seed=2**63 - 1),
    RowParams(temperature=0.5),
]


@pytest.mark.parametrize("counts", [[1, 1, 1, 1], [3, 1, 2, 4], [2, 2, 0, 1]])
def test_counts_stand_for_repeated_entries(counts: list[int], copies: list[Any]) -> None:
    repeated = [param for param, count in zip(CROWD, counts, strict=True) for _ in range(count)]
    found, expected = SamplingRows.from_params(CROWD, counts=counts), SamplingRows.from_params(repeated)
    assert len(copies) == 4, "two each"
    assert found.params == expected.params == tuple(repeated)
    for name in (
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "greedy",
        "sampled_rows",
        "truncated_rows",
    ):
        mine, theirs = getattr(found, name), getattr(expected, name)
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs), name
    assert found.seed.tolist() == [param.seed for param in repeated]
    assert found.greedy.tolist() == [param.greedy for param in repeated]
    sampled = [row for row, param in enumerate(repeated) if not param.greedy]
    assert found.sampled_rows.tolist() == sampled
    cut = [index for index, row in enumerate(sampled) if repeated[row].truncated]
    assert found.truncated_rows.tolist() == cut


def test_no_rows_at_all() -> None:
    rows = SamplingRows.from_params([], counts=[])
    assert len(rows) == 0 and not rows.any_sampled and not rows.any_truncated
    tokens = sampling.sample(torch.empty(0, VOCABULARY), rows, torch.empty(0, dtype=torch.int64))
    assert tokens.shape == (0,)


@pytest.fixture
def make_pass() -> Callable[..., CanonicalPass]:
    """Canonical passes without a model."""
    table = torch.arange(POOL * 64, dtype=torch.int32).view(POOL, 64)
    model_runner: Any = SimpleNamespace(
        device="cpu",
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        model_config=SimpleNamespace(context_len=63),
        spec_algorithm=None,
    )
    attention = cast("Any", lambda *arguments: None)
    return lambda segments, rows, block_rows=None: CanonicalPass(
        model_runner, segments, rows, attention, block_rows=block_rows
    )


def test_batch_of_a_pass_in_two_copies(make_pass: Callable[..., CanonicalPass], copies: list[Any]) -> None:
    candidates = CandidateTable(POOL, 60, "cpu")
    candidates.write(torch.tensor([5, 5, 5]), torch.tensor([10, 11, 12]), torch.tensor([21, 22, 23]))
    segments = [
        PassSegment(SegmentKind.PROMPT, 3, 2, (31, 32), 2),
        PassSegment(SegmentKind.VERIFY, 5, 10, (), 3),
        PassSegment(SegmentKind.PROMPT, 3, 4, [33, 34, 35, 36], 4),
    ]
    batch = make_pass(5, 4).forward_batch(segments, candidates)
    assert len(copies) == 2
    assert batch.input_ids.view(5, 4).tolist() == [
        [31, 32, 0, 0],
        [21, 22, 23, 0],
        [33, 34, 35, 36],
        [0] * 4,
        [0] * 4,
    ]
    assert batch.positions.view(5, 4).tolist() == [
        [2, 3, 4, 5],
        [10, 11, 12, 13],
        [4, 5, 6, 7],
        [0, 1, 2, 3],
        [0, 1, 2, 3],
    ]
    assert batch.out_cache_loc.view(5, 4).tolist() == [
        [3 * 64 + 2, 3 * 64 + 3, 0, 0],
        [5 * 64 + 10, 5 * 64 + 11, 5 * 64 + 12, 0],
        [3 * 64 + 4 + i for i in range(4)],
        [0] * 4,
        [0] * 4,
    ]
    assert batch.req_pool_indices.tolist() == [3, 5, 3, 0, 0]
    assert batch.seq_lens.tolist() == [6, 14, 8, 4, 4] == batch.seq_lens_cpu.tolist()
    assert batch.extend_prefix_lens.tolist() == [2, 10, 4, 0, 0]


def test_segments_take_whole_blocks(make_pass: Callable[..., CanonicalPass], copies: list[Any]) -> None:
    candidates = CandidateTable(POOL, 60, "cpu")
    candidates.write(torch.tensor([5, 5, 5]), torch.tensor([10, 11, 12]), torch.tensor([21, 22, 23]))
    segments = [
        PassSegment(SegmentKind.PROMPT, 3, 2, (31, 32, 33, 34, 35), 5),
        PassSegment(SegmentKind.VERIFY, 5, 10, (), 3),
        PassSegment(SegmentKind.PROMPT, 4, 0, [36], 1),
    ]
    made = make_pass(3, 4, 2)
    assert (made.total_rows, made.blocks) == (12, 6)
    batch = made.forward_batch(segments, candidates)
    assert len(copies) == 2
    assert batch.input_ids.view(6, 2).tolist() == [[31, 32], [33, 34], [35, 0], [21, 22], [23, 0], [36, 0]]
    assert batch.positions.view(6, 2).tolist() == [[2, 3], [4, 5], [6, 7], [10, 11], [12, 13], [0, 1]]
    assert batch.out_cache_loc.tolist() == [
        *(3 * 64 + position for position in (2, 3, 4, 5, 6)),
        0,
        *(5 * 64 + position for position in (10, 11, 12)),
        0,
        4 * 64,
        0,
    ]
    assert batch.req_pool_indices.tolist() == [3, 3, 3, 5, 5, 4]
    assert batch.rids == ["3", "3", "3", "5", "5", "4"]
    assert batch.extend_prefix_lens_cpu == [2, 4, 6, 10, 12, 0]
    assert batch.batch_size == 6 and batch.extend_num_tokens == 12
    assert first_rows((segment.rows for segment in segments), 2) == [0, 6, 10, 12]
    with pytest.raises(ValueError, match="6 blocks cannot hold 7"):
        made.forward_batch([*segments, PassSegment(SegmentKind.VERIFY, 6, 1, (), 1)], candidates)


def test_a_pass_that_only_verifies_takes_one_copy(
    make_pass: Callable[..., CanonicalPass], copies: list[Any]
) -> None:
    candidates = CandidateTable(POOL, 60, "cpu")
    candidates.write(torch.tensor([5, 5]), torch.tensor([10, 11]), torch.tensor([21, 22]))
    batch = make_pass(2, 2).forward_batch([PassSegment(SegmentKind.VERIFY, 5, 10, (), 2)], candidates)
    assert len(copies) == 1
    assert batch.input_ids.tolist() == [21, 22, 0, 0] and batch.input_ids.dtype == torch.int64


@pytest.mark.gpu
def test_transfers_to_a_gpu_wait_for_nothing() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    logits = torch.zeros(9, VOCABULARY, device="cuda")
    candidates = torch.zeros(3, dtype=torch.int64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        parts = []
        for number, more in enumerate(PENALISED):
            req = _request(12, **more)
            stop_tokens, rows_of = logit_processing.stop_tokens(req), logits[2 * number : 2 * number + 2]
            decided = array("q", [number])
            parts.append(RequestRows(rows_of, req, decided, candidates, 2, None, stop_tokens))
        logit_processing.apply(parts)
        rows = to_device(consecutive_rows([(0, 5, 3), (8, 9, 4)], [2, 3]), "cuda")
        numbers = to_device([[1, 2], [3, 4]], "cuda", torch.int64)
        SamplingRows.from_params(CROWD, "cuda", [1, 2, 3, 4])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits[4, 7].isinf() and not logits[5].isfinite().all() and logits[8].eq(0).all()
    assert rows.tolist() == [[0, 1, 8, 9, 10], [5, 6, 9, 10, 11], [3, 3, 4, 4, 4]]
    assert numbers.tolist() == [[1, 2], [3, 4]]
