"""Plot what marked requests cost, from the CSV file of ``bench_llm42_cpu.py`` (comparison ``shares``).

    python scripts/plot_llm42_cost.py docs/benchmarks/llm42-cpu.csv docs/benchmarks/llm42-cpu.png

Needs matplotlib (the other benchmarks leave their figure out without it). Exit status: 0, or 2 if the
arguments are wrong, or the file cannot be read or lacks the comparison.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

COMPARISON = "shares"
BASELINE = "without --enable-llm42"
ONE_AT_A_TIME = "one at a time, stock"

#: Contenders by the share of their requests that is marked, in percent.
SHARES = {
    "with --enable-llm42": 0,
    "every tenth marked": 10,
    "every other marked": 50,
    "all marked": 100,
}


def ratios(path: Path) -> dict[str, list[float]]:
    """Throughput of each contender by the baseline's in the same round.

    Raises:
        ValueError: the file lacks the comparison or one of its contenders.
    """
    throughput: dict[str, dict[str, float]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["comparison"] == COMPARISON:
                throughput[row["contender"]][row["round"]] = float(row["tokens_per_s"])
    missing = {BASELINE, ONE_AT_A_TIME, *SHARES} - set(throughput)
    if missing:
        raise ValueError(f"{path} has no rounds of {', '.join(sorted(missing))} in comparison {COMPARISON!r}")
    baseline = throughput[BASELINE]
    return {
        name: [value / baseline[number] for number, value in rounds.items()]
        for name, rounds in throughput.items()
    }


def plot(values: dict[str, list[float]], output: Path) -> None:
    """Throughput over the share of marked requests, every round as a point."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    medians = [statistics.median(values[name]) for name in SHARES]
    axes.plot(SHARES.values(), medians, color="tab:blue", label="with --enable-llm42, median")
    for name, share in SHARES.items():
        axes.plot([share] * len(values[name]), values[name], "o", color="tab:blue", markersize=3)
    axes.axhline(1.0, color="black", linewidth=1, label="stock")
    slow = statistics.median(values[ONE_AT_A_TIME])
    axes.axhline(slow, color="tab:red", linewidth=1, label="stock, one request at a time")
    axes.set(
        title="Throughput with deterministic requests, CPU",
        xlabel="marked requests, percent",
        ylabel="output tokens/s relative to stock",
        ylim=(0, None),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(output, dpi=120)


def main() -> int:
    """Exit status as in the module's text."""
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        plot(ratios(Path(sys.argv[1])), Path(sys.argv[2]))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
