"""The fused step's time model, fitted to measured times."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_ext.tokenweave.measure_ranks import TOKENS, fit
from sglang_ext.tokenweave.split import CommModel


@given(latency=st.floats(1, 100), speed=st.floats(1e4, 1e6), hidden=st.sampled_from([1024, 4096, 8192]))
def test_a_line_is_found_again(latency: float, speed: float, hidden: int) -> None:
    true = CommModel(latency, speed)
    found = fit(TOKENS, [true.time_us(tokens, hidden) for tokens in TOKENS], hidden)
    assert found.latency_us == pytest.approx(latency, rel=1e-3, abs=1e-3)
    assert found.bytes_per_us == pytest.approx(speed, rel=1e-3)


def test_latency_is_never_negative() -> None:
    found = fit((512, 1024, 2048), (1.0, 10.0, 30.0), 4096)
    assert found.latency_us == 0
    assert found.time_us(1024, 4096) > 0


def test_times_that_shrink_are_refused() -> None:
    with pytest.raises(ValueError, match="do not grow"):
        fit((512, 1024, 2048), (30.0, 20.0, 10.0), 4096)
