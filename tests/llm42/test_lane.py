"""The lane's bookkeeping and policy, simulated without a model."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sglang_ext.llm42.lane import LaneConfig, LanePolicy, LaneRequest, Segment, SegmentKind, leading_matches


class Simulation:
    """Runs the lane over requests whose true continuation is known; drafts are wrong at random."""

    def __init__(self, config: LaneConfig, seed: int, error_rate: float) -> None:
        self.config = config
        self.policy = LanePolicy(config)
        self.random = random.Random(seed)
        self.error_rate = error_rate
        self.requests: dict[LaneRequest, list[bool]] = {}
        self.waited: dict[LaneRequest, int] = {}
        self.launched: list[Segment] = []
        self.passes: list[list[Segment]] = []
        self.step = 0

    def admit(self, known: int, cached: int, max_new: int) -> LaneRequest:
        request = LaneRequest(known_end=known, max_end=known + max_new, canonical_end=cached)
        self.requests[request] = []
        return request

    def run_step(self, canonical: bool = False) -> None:
        """One decode step: apply, launch, draft - the order of the runtime.

        Args:
            canonical: whether the step decides for settled requests; others are urgent, and wait while their
                candidates are verified by a pass that is launched before.
        """
        self.step += 1
        for segment in self.launched:
            self.apply(segment)
        drafting = [r for r in self.requests if r.can_decode(self.config.capacity)]
        self.launched = []
        if canonical and (unsettled := [r for r in self.requests if r.pending]):
            for request in unsettled:
                request.urgent = True
            self.launched = self.policy.plan(list(self.requests), self.step, True)
            drafting = [r for r in drafting if r.in_flight == 0]
        if not self.launched:
            self.launched = self.policy.plan(list(self.requests), self.step, bool(drafting))
        self.check(self.launched)
        if self.launched:
            self.passes.append(self.launched)
        for request in drafting:
            write = request.decode_position
            for segment in self.launched:
                if segment.request is request:
                    assert write >= segment.start + segment.rows, "decode would overwrite canonical KV"
            if canonical and request.settled:
                assert write == request.canonical_end, "a row is canonical on canonical KV alone"
                request.decoded()
                continue
            request.drafted()
            self.requests[request].append(self.random.random() < self.error_rate)

    def apply(self, segment: Segment) -> None:
        request = segment.request
        before = request.canonical_end
        if segment.kind is SegmentKind.PROMPT:
            assert segment.start == request.canonical_end
            request.prompt_done(segment.rows)
        else:
            wrong = self.requests[request]
            matched = leading_matches([0] * segment.rows, [int(w) for w in wrong[: segment.rows]])
            committed = request.verify_done(segment.rows, matched)
            assert 1 <= committed <= segment.rows
            self.requests[request] = wrong[segment.rows :] if matched == segment.rows else []
        assert request.canonical_end > before, "commits only grow"
        assert len(self.requests[request]) == request.pending
        assert request.in_flight >= 0

    def check(self, segments: list[Segment]) -> None:
        assert self.policy.blocks_of(segments) <= self.config.blocks
        last_end: dict[LaneRequest, int] = {}
        for segment in segments:
            assert 1 <= segment.rows <= self.config.window_size
            if segment.request in last_end:
                assert segment.kind is SegmentKind.PROMPT
                assert segment.start == last_end[segment.request], "segments of a request are consecutive"
            last_end[segment.request] = segment.start + segment.rows


@st.composite
def some_configs(draw: st.DrawFn) -> LaneConfig:
    window = draw(st.integers(1, 9))
    return LaneConfig(
        window_size=window,
        verify_batch_size=draw(st.integers(1, 6)),
        max_wait_steps=draw(st.integers(0, 6)),
        block_rows=draw(st.sampled_from([rows for rows in range(1, window + 1) if window % rows == 0])),
    )


configs = some_configs()
prompts = st.lists(
    st.tuples(st.integers(1, 60), st.integers(0, 59), st.integers(0, 40)), min_size=1, max_size=8
)


@given(
    configs,
    prompts,
    st.integers(0, 1000),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.lists(st.tuples(st.booleans(), st.integers(1, 12)), min_size=1, max_size=8),
)
@settings(deadline=None, max_examples=200)
def test_every_request_completes(
    config: LaneConfig,
    sizes: list[tuple[int, int, int]],
    seed: int,
    error_rate: float,
    steps: list[tuple[bool, int]],
) -> None:
    """Whatever steps are canonical; ``steps`` says of so many whether they are, over and over again."""
    canonical = itertools.cycle([kind for kind, count in steps for _ in range(count)])
    simulation = Simulation(config, seed, error_rate)
    requests = [simulation.admit(known, min(cached, known - 1), max_new) for known, cached, max_new in sizes]
    for _ in range(20_000):
        if all(r.complete for r in requests):
            break
        simulation.run_step(next(canonical))
    assert all(r.complete for r in requests), "a request starves"
    for request, (known, _, max_new) in zip(requests, sizes, strict=True):
        assert request.base is not None
        assert request.base + 1 <= max(request.max_end, known + 1), "no token behind the length limit"
        assert request.base + 1 >= known + min(1, max_new)


@given(configs, st.integers(0, 1000), st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_once_all_steps_are_canonical_candidates_run_out(config: LaneConfig, seed: int, drafted: int) -> None:
    """Nobody goes on drafting beside a pass that verifies it, or there would always be another candidate."""
    assume(config.blocks >= 5)
    simulation = Simulation(config, seed, 0.1)
    requests = [simulation.admit(3, 0, 200) for _ in range(5)]
    while not all(r.decoding for r in requests):
        simulation.run_step()
    for _ in range(drafted):
        simulation.run_step()
    passes = len(simulation.passes)
    for _ in range(5 * (2 * config.window_size + drafted) + 5):
        simulation.run_step(canonical=True)
    assert all(r.settled for r in requests)
    settled = len(simulation.passes)
    for _ in range(10):
        simulation.run_step(canonical=True)
    assert passes <= settled == len(simulation.passes), "settled requests need no pass"


@given(configs, st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_a_due_window_waits_no_longer_than_the_rule_says(config: LaneConfig, seed: int) -> None:
    """With prompts arriving all the time and more windows than fit, each is served in bounded time."""
    simulation = Simulation(config, seed, 0.05)
    rng = random.Random(seed)
    since: dict[LaneRequest, int] = {}
    limit = 0
    for step in range(400):
        if step % 2 == 0 and len(simulation.requests) < 12:
            simulation.admit(rng.randint(1, 40), 0, rng.randint(1, 30))
        limit = max(limit, len(simulation.requests))
        simulation.run_step()
        planned = {s.request for s in simulation.launched}
        for request in list(simulation.requests):
            if request.complete and request.in_flight == 0:
                del simulation.requests[request]
                since.pop(request, None)
            elif request in planned or request.due_since is None:
                since.pop(request, None)
            elif request.decoding:
                since.setdefault(request, step)
                # At least every second pass segment goes to windows, oldest first; a full round over
                # all requests plus the permitted wait bounds the delay.
                assert step - since[request] <= config.patience + 2 * limit + 2


def decoding(pending: int, **traits: bool) -> LaneRequest:
    """A request behind its prompt of one token, with candidates."""
    request = LaneRequest(known_end=1, max_end=100, canonical_end=0, **traits)
    request.prompt_planned(1)
    request.prompt_done(1)
    request.pending = pending
    return request


def test_pass_waits_to_fill_up_and_then_runs() -> None:
    config = LaneConfig(window_size=2, verify_batch_size=2, max_wait_steps=3)
    policy = LanePolicy(config)
    request = LaneRequest(known_end=1, max_end=100, canonical_end=0)
    [prompt] = policy.plan([request], 1, can_decode=False)
    assert prompt.finishes_prompt
    request.prompt_done(prompt.rows)
    request.drafted()
    assert policy.plan([request], 2, can_decode=True) == []
    request.drafted()
    assert policy.plan([request], 3, can_decode=True) == []
    assert policy.plan([request], 5, can_decode=True) == []
    assert len(policy.plan([request], 6, can_decode=True)) == 1


def test_urgent_request_is_verified_at_once_and_fills_up_with_others() -> None:
    policy = LanePolicy(LaneConfig(window_size=8, verify_batch_size=3))
    requests = [decoding(pending) for pending in (1, 5, 2, 3)]
    assert policy.plan(requests, 1, can_decode=True) == []
    requests[0].urgent = True
    segments = policy.plan(requests, 2, can_decode=True)
    assert [s.request for s in segments] == [requests[0], requests[1], requests[3]]
    assert [s.rows for s in segments] == [1, 5, 3]


def test_few_windows_wait_longer_than_those_that_fill_the_smallest_pass() -> None:
    config = LaneConfig(window_size=32, verify_batch_size=8, max_wait_steps=2)
    assert config.patience == 8

    def waits(windows: int, **traits: bool) -> int:
        policy = LanePolicy(config)
        policy.sizes = (2, 8)
        requests = [decoding(32, **traits) for _ in range(windows)]
        return next(step for step in range(100) if policy.plan(requests, step, can_decode=True))

    assert [waits(windows) for windows in (1, 2, 7, 8)] == [8, 2, 2, 0]
    assert waits(1, streamed=True) == 2
    assert waits(1, urgent=True) == 0


def test_finished_output_waits_for_its_verification_no_longer_than_it_must() -> None:
    policy = LanePolicy(LaneConfig(window_size=32, verify_batch_size=8, max_wait_steps=2))
    request = decoding(10)
    request.max_end = 12
    assert request.length_reached
    assert [len(policy.plan([request, decoding(1)], step, can_decode=True)) for step in range(3)] == [0, 0, 2]


def test_a_pass_is_no_larger_than_what_is_due() -> None:
    """Room that costs nothing is filled; a larger pass for what could wait would not be free."""
    policy = LanePolicy(LaneConfig(window_size=8, verify_batch_size=8))
    policy.sizes = (2, 4, 8)
    requests = [decoding(8) for _ in range(3)] + [decoding(pending) for pending in (5, 6, 7)]
    requests[0].urgent = True
    segments = policy.plan(requests, 1, can_decode=True)
    assert [s.rows for s in segments] == [8, 8, 8, 7]
    prompts = [
        LaneRequest(known_end=8 * 5, max_end=90, canonical_end=0),
        decoding(3),
        decoding(4),
        decoding(5),
    ]
    kinds = [s.kind for s in policy.plan(prompts, 2, can_decode=True)]
    assert kinds.count(SegmentKind.PROMPT) == 5
    assert kinds.count(SegmentKind.VERIFY) == 3


def test_room_in_a_pass_goes_to_doubtful_candidates_first() -> None:
    policy = LanePolicy(LaneConfig(window_size=8, verify_batch_size=2, max_wait_steps=0))
    full, many, doubtful = decoding(8), decoding(7), decoding(2)
    doubtful.doubtful = True
    assert policy.plan([many, doubtful], 1, can_decode=True) == []
    full.urgent = True
    segments = policy.plan([many, doubtful, full], 2, can_decode=True)
    assert [s.request for s in segments] == [full, doubtful]
    assert not doubtful.doubtful


def test_prompts_that_fill_whole_passes_are_computed_without_decode_steps() -> None:
    policy = LanePolicy(LaneConfig(window_size=512, verify_batch_size=4, max_wait_steps=1))
    prompt = LaneRequest(known_end=4 * 512, max_end=9000, canonical_end=0)
    crowd = [prompt, *(decoding(1) for _ in range(20))]
    held = [policy.decide_hold(crowd) for _ in range(6)]
    assert held == [True] * 4 + [False, True], "8,192 rows in a row"
    prompt.prompt_planned(512)
    assert not policy.decide_hold(crowd), "what is left fills no pass"


@pytest.mark.parametrize(
    ("window", "group", "most"), [(64, 8, 16), (32, 32, 8), (16, 16, 16), (8, 4, 1), (1, 1, 1)]
)
def test_decode_waits_for_a_bounded_number_of_passes(window: int, group: int, most: int) -> None:
    policy = LanePolicy(LaneConfig(window, group, max_wait_steps=1))
    prompt = LaneRequest(known_end=100_000, max_end=200_000, canonical_end=0)
    crowd = [prompt, *(decoding(1) for _ in range(20))]
    held = [policy.decide_hold(crowd) for _ in range(most + 1)]
    assert held == [True] * most + [False]


def test_passes_follow_each_other_while_most_requests_wait_for_their_prompt() -> None:
    policy = LanePolicy(LaneConfig(window_size=8, verify_batch_size=4, max_wait_steps=2))
    waiting = [LaneRequest(known_end=8, max_end=90, canonical_end=0) for _ in range(2)]
    assert not policy.decide_hold(waiting), "there is no decode step to leave out"
    held = [policy.decide_hold([*waiting, decoding(1)]) for _ in range(6)]
    assert held == [True, True, False, True, True, False]
    assert not policy.decide_hold([*waiting, decoding(1), decoding(1)])
    for prompt in waiting:
        prompt.prompt_planned(8)
    assert not policy.decide_hold([*waiting, decoding(1)]), "no pass would be launched"


def test_stream_is_due_at_half_a_window() -> None:
    policy = LanePolicy(LaneConfig(window_size=8, verify_batch_size=1))
    assert policy.plan([decoding(4)], 1, can_decode=True) == []
    assert policy.plan([decoding(3, streamed=True)], 1, can_decode=True) == []
    assert len(policy.plan([decoding(4, streamed=True)], 1, can_decode=True)) == 1


def test_no_refused_token_is_kept_when_more_wait_than_a_window_holds() -> None:
    """The original cut the list of candidates at the wrong end there."""
    request = decoding(70)
    request.verify_planned(64)
    assert request.verify_done(64, matched=60) == 61
    assert (request.base, request.pending, request.in_flight) == (1 + 61, 0, 0)


def test_candidate_in_a_pass_under_way_is_being_judged() -> None:
    request = decoding(3)
    assert request.base == 1
    assert [request.being_judged(position) for position in (1, 2)] == [True, False]
    request.verify_planned(2)
    assert [request.being_judged(position) for position in (2, 3, 4)] == [True, True, False]


def test_a_canonical_step_decides_the_token_behind_settled_ones() -> None:
    request = decoding(0)
    assert request.settled and request.base == 1
    request.decoded()
    assert (request.base, request.canonical_end, request.planned_end) == (2, 2, 2)
    assert request.settled and not request.prefilling


@pytest.mark.parametrize("planned", [False, True])
def test_it_decides_nothing_behind_candidates(planned: bool) -> None:
    request = decoding(2)
    if planned:
        request.verify_planned(2)
    assert not request.settled
    with pytest.raises(ValueError, match="not settled"):
        request.decoded()
    prompt = LaneRequest(known_end=5, max_end=10, canonical_end=2)
    with pytest.raises(ValueError, match="not settled"):
        prompt.decoded()


def test_prompts_and_windows_share_the_pass() -> None:
    policy = LanePolicy(LaneConfig(window_size=2, verify_batch_size=4))
    long_prompt = LaneRequest(known_end=100, max_end=200, canonical_end=0)
    running = [decoding(2) for _ in range(3)]
    kinds = [s.kind for s in policy.plan([long_prompt, *running], 1, can_decode=True)]
    assert kinds == [SegmentKind.PROMPT] * 2 + [SegmentKind.VERIFY] * 2


def test_prompt_must_leave_a_row_to_compute() -> None:
    with pytest.raises(ValueError, match="at least one"):
        LaneRequest(known_end=5, max_end=10, canonical_end=5)


def test_more_matches_than_candidates_are_refused() -> None:
    request = LaneRequest(known_end=1, max_end=9, canonical_end=0)
    request.prompt_planned(1)
    request.prompt_done(1)
    request.drafted()
    request.verify_planned(1)
    with pytest.raises(ValueError, match="matched 2"):
        request.verify_done(1, 2)


@pytest.mark.parametrize("arguments", [(0, 1), (1, 0), (1, 1, -1), (4, 1, 0, 3)])
def test_impossible_lanes_are_refused(arguments: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        LaneConfig(*arguments)
