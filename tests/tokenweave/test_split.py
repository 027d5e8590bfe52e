"""The wave model and the rule that chooses the cut."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.tokenweave import split
from sglang_ext.tokenweave.split import CommModel, MeasuredModel, SplitRule, Tile, WaveModel

LLAMA_70B = split.dense_layer(8192, 28672, 64, 8, 128, world=8)
NO_COMM = CommModel(latency_us=0.0, bytes_per_us=math.inf)


def rule(comm: CommModel | None = None, **changes: object) -> SplitRule:
    model = WaveModel(LLAMA_70B)
    return SplitRule(beside=model, alone=model, comm=comm or CommModel(), hidden=8192, **changes)  # type: ignore[arg-type]


def test_shapes_of_a_70b_llama_on_eight_ranks() -> None:
    assert [(gemm.n, gemm.k) for gemm in (*LLAMA_70B.attention, *LLAMA_70B.mlp)] == [
        (1280, 8192),
        (8192, 1024),
        (7168, 8192),
        (8192, 3584),
    ]


def test_waves_by_hand() -> None:
    tile = Tile(128, 256, 1.0)
    assert split.waves(1024, 7168, tile, 132) == 2  # 8 x 28 = 224 tiles
    assert split.waves(512, 7168, tile, 132) == 1  # 4 x 28 = 112 tiles
    assert split.waves(640, 7168, tile, 132) == 2  # 5 x 28 = 140 tiles
    assert split.waves(1, 1, tile, 132) == 1


@given(tokens=st.integers(1, 20000), granularity=st.sampled_from([64, 128, 256]))
def test_candidates_leave_two_large_halves(tokens: int, granularity: int) -> None:
    cuts = split.candidate_cuts(tokens, granularity)
    assert cuts == sorted(set(cuts))
    for cut in cuts:
        assert min(cut, tokens - cut) >= max(int(tokens * split.SMALLEST_SHARE), 1)
        assert cut % granularity == 0 or (tokens - cut) % granularity == 0


@given(tokens=st.integers(1, 20000))
def test_the_chosen_cut_is_the_fastest_and_wins(tokens: int) -> None:
    chosen = rule()
    decision = chosen.decide(tokens)
    if decision.cut is None:
        return
    times = {cut: chosen.split_us(tokens, cut) for cut in split.candidate_cuts(tokens)}
    assert times[decision.cut] == min(times.values()) == decision.split_us
    assert decision.split_us <= (1 - chosen.margin) * decision.whole_us
    assert tokens >= chosen.min_tokens


def test_a_smart_cut_avoids_the_extra_wave_of_an_equal_one() -> None:
    # 1280 tokens cut equally: 2 x 640 rows need 2 waves each of gate_up; 512 + 768 need 1 + 2.
    single_tile = split.Gpu(132, 790e6, tiles=(Tile(128, 256, 1.0),))
    model = WaveModel(LLAMA_70B, single_tile)
    chosen = SplitRule(beside=model, alone=model, comm=NO_COMM, hidden=8192, margin=-1.0)
    decision = chosen.decide(1280)
    assert decision.cut in (512, 768)
    assert decision.split_us < chosen.split_us(1280, 640)


def test_without_communication_nothing_is_cut() -> None:
    for tokens in range(1024, 8192, 331):
        decision = rule(NO_COMM).decide(tokens)
        assert decision.cut is None and "predicted to lose" in decision.reason


def test_below_the_threshold_nothing_is_cut() -> None:
    assert rule(min_tokens=2048).decide(2047).cut is None
    assert rule(min_tokens=2048).decide(2048).cut is not None


def test_a_slow_host_forbids_the_cut() -> None:
    fast = rule().decide(2048)
    assert fast.cut is not None
    slow = rule(host_us=fast.whole_us).decide(2048)
    assert slow.cut is None


def test_measured_table_is_a_staircase() -> None:
    table = MeasuredModel(tokens=(128, 256), attention=(10.0, 12.0), mlp=(20.0, 30.0))
    assert table.attention_us(1) == 10.0 and table.attention_us(128) == 10.0
    assert table.attention_us(129) == 12.0
    assert table.mlp_us(512) == 60.0


@pytest.mark.parametrize("tokens", [(), (256, 128), (128, 128)])
def test_measured_table_must_ascend(tokens: tuple[int, ...]) -> None:
    times = tuple(1.0 for _ in tokens)
    with pytest.raises(ValueError, match="ascending"):
        MeasuredModel(tokens=tokens, attention=times, mlp=times)


def test_canonical_passes_are_cut_in_equal_halves_of_whole_segments() -> None:
    assert split.equal_cut(512, 32) == 256
    with pytest.raises(ValueError, match="no equal halves"):
        split.equal_cut(96, 32)
