"""Pure parts of ``scripts/bench_llm42_cpu.py``: flags, ratios and reports, without a server."""

from __future__ import annotations

import csv
from pathlib import Path

import bench_llm42_cpu as bench
import plot_llm42_cost as cost
import pytest
from bench_llm42_cpu import COMPARISONS, Comparison, Load, Round

SHARES, SMALL_KV = COMPARISONS
FLAGS = bench.base_flags(bench.parse_arguments([]))
COUNTERS = {
    "candidates_accepted": 95,
    "tokens_rolled_back": 5,
    "rollbacks": 2,
    "verify_total_reqs": 12,
    "verify_total_tokens": 60,
    "prompt_tokens": 20,
    "padded_rows": 20,
    "decode_steps": 30,
    "mixed_decode_steps": 25,
    "decode_deterministic_rows": 90,
    "decode_other_rows": 80,
    "verify_forward_passes": 9,
}


def _rounds(comparison: Comparison, *seconds: tuple[float, ...]) -> list[Round]:
    """One tuple of seconds for each contender, round by round, at 100 tokens."""
    return [
        Round(
            comparison.name, contender.name, number, value, 100, number, COUNTERS if contender.llm42 else {}
        )
        for contender, values in zip(comparison.contenders, seconds, strict=False)
        for number, value in enumerate(values)
    ]


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: c.name)
def test_only_servers_with_llm42_get_its_flags(comparison: Comparison) -> None:
    for contender in comparison.contenders:
        flags = bench.server_flags(comparison, contender, FLAGS)
        assert any("llm42" in flag for flag in flags) is contender.llm42
        assert set(comparison.flags) <= set(flags)
        if not contender.llm42:
            assert not any(map(contender.marked, range(4)))


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda c: c.name)
def test_contenders_of_one_server_have_the_same_flags(comparison: Comparison) -> None:
    by_server: dict[str, set[tuple[str, ...]]] = {}
    for contender in comparison.contenders:
        flags = tuple(bench.server_flags(comparison, contender, FLAGS))
        by_server.setdefault(contender.server, set()).add(flags)
    assert all(len(flags) == 1 for flags in by_server.values())


def test_ratio_pairs_rounds() -> None:
    """A machine that becomes ten times slower between rounds does not change it."""
    rounds = _rounds(SMALL_KV, (1.0, 10.0, 1.0), (2.0, 20.0, 2.0))
    assert bench.round_ratio(rounds, *(c.name for c in SMALL_KV.contenders)) == 0.5


@pytest.mark.parametrize(("seconds", "verdict"), [(1.03, "**0.971, met**"), (1.05, "**0.952, missed**")])
def test_verdict(seconds: float, verdict: str) -> None:
    rounds = _rounds(SMALL_KV, (1.0,), (seconds,))
    assert verdict in bench.comparison_section(SMALL_KV, rounds, FLAGS)


def test_targets_name_contenders() -> None:
    for comparison in COMPARISONS:
        names = {contender.name for contender in comparison.contenders}
        assert {name for t in comparison.targets for name in (t.contender, t.baseline)} <= names


def test_report_and_csv(tmp_path: Path) -> None:
    rounds = _rounds(SHARES, (2.0, 2.0), (2.0, 2.1), (3.0, 3.0), (4.0, 4.0), (4.0, 5.0), (10.0, 10.0))
    load = Load([[1] * 10, [1] * 30], 2, 50)
    text = bench.report([(SHARES, rounds)], load, "the command", {"CPU": "a processor"}, FLAGS)
    assert "the command" in text
    assert "| prompts | 10 to 30 tokens |" in text
    assert "| one at a time, stock | 10.0, 10.0 | 10.0 | 0.200 | 1 |" in text
    assert "| all marked | 25.0, 20.0 | 22.5 | 0.450 | 1 |" in text
    assert "**0.976, met**" in text
    assert "**2.250, met**" in text
    assert "| all marked | 95.0 % | 4 | 24 | 60 | 50 | 180 | 160 | 18 | 20.0 % | 5.6 % | 22.2 % |" in text
    bench.write_csv(tmp_path / "rounds.csv", rounds)
    with (tmp_path / "rounds.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["tokens_per_s"] for row in rows][6:] == ["25.00", "25.00", "25.00", "20.00", "10.00", "10.00"]
    assert [row["rollbacks"] for row in rows] == ["", "", *["2"] * 8, "", ""]


def test_where_it_goes_is_not_part_of_the_command() -> None:
    words = ["--quick", "--output", "/a/b", "--only", "shares", "--output=/c"]
    assert bench.command_line(words) == "python scripts/bench_llm42_cpu.py --quick --only shares"


def test_quick_leaves_what_was_said() -> None:
    arguments = bench.parse_arguments(["--quick", "--rounds", "4"])
    assert (arguments.rounds, arguments.requests) == (4, 6)


def test_plot_shows_ratios_within_a_round(tmp_path: Path) -> None:
    seconds = [(float(i), 10.0 * i) for i in range(1, len(SHARES.contenders) + 1)]
    bench.write_csv(tmp_path / "rounds.csv", _rounds(SHARES, *seconds))
    values = cost.ratios(tmp_path / "rounds.csv")
    assert values[cost.BASELINE] == [1.0, 1.0]
    assert values["every tenth marked"] == pytest.approx([1 / 3, 1 / 3], abs=0.01)
    assert {cost.BASELINE, cost.ONE_AT_A_TIME, *cost.SHARES} == {c.name for c in SHARES.contenders}


def test_plot_names_what_is_missing(tmp_path: Path) -> None:
    bench.write_csv(tmp_path / "rounds.csv", _rounds(SHARES, (1.0,), (1.0,)))
    with pytest.raises(ValueError, match="all marked"):
        cost.ratios(tmp_path / "rounds.csv")
