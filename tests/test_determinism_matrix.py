"""Pure parts of ``scripts/determinism_matrix.py``: planning, resuming, comparing, reporting; no server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import determinism_matrix as matrix
import pytest
import serving
import state_file
from determinism_matrix import CONDITIONS, REFERENCE, Condition, Crowd, State, Subject
from serving import Output

MODES = list(matrix.MODES)
CROWD_8 = next(c for c in CONDITIONS if c.name == "restart-crowd-8")
CONFIGURATION: dict[str, Any] = {
    "model": "smollm2",
    "flags": ["--enable-llm42"],
    "max_new_tokens": 8,
    "modes": matrix.MODES,
    "prompts_digest": "0",
    "machine": {"CPU": "a processor", "cores": "2"},
}


def _output(ids: Sequence[int] = (1, 2, 3), text: str = "abc", finish: str = '{"type": "stop"}') -> Output:
    meta = {
        "cached_tokens": 5,
        "llm42_num_rollbacks": 1,
        "llm42_tokens_rolled_back": 4,
        "llm42_num_verification_windows": 2,
    }
    return Output(tuple(ids), text, finish, meta)


def _line(condition: Condition, rows: Sequence[dict[str, Any]], server: int = 0) -> dict[str, Any]:
    statistics = {
        "candidates_accepted": 90,
        "tokens_rolled_back": 10,
        "decode_steps": 20,
        "mixed_decode_steps": 15,
        "verify_forward_passes": 7,
    }
    return {
        "condition": condition.name,
        "server": server,
        "seconds": 2.0,
        "filler_tokens": 11,
        "statistics": statistics,
        "outputs": list(rows),
    }


def _marked(condition: Condition, subject: Subject, output: Output) -> dict[str, Any]:
    return _line(condition, [matrix.output_row(subject, True, output)])


def _stock(condition: Condition, subject: Subject, output: Output) -> dict[str, Any]:
    return _line(condition, [matrix.output_row(subject, False, output)])


def _finish(crowds: Sequence[Crowd], state: State) -> None:
    """As if every request of ``crowds`` had been run."""
    for crowd in crowds:
        rows = [matrix.output_row(subject, True, _output()) for subject in crowd.checked]
        rows += [matrix.output_row(subject, False, _output()) for subject in crowd.stock]
        state.add(_line(crowd.condition, rows))


# Comparing


@pytest.mark.parametrize(
    ("output", "what", "token"),
    [
        (_output(), (), None),
        (_output(ids=(1, 9, 3)), ("tokens",), 1),
        (_output(ids=(1, 2)), ("tokens",), 2),
        (_output(ids=(1, 2, 3, 4)), ("tokens",), 3),
        (_output(text="abd"), ("text",), None),
        (_output(finish='{"type": "length"}'), ("finish reason",), None),
        (_output(ids=(7,), text="", finish="null"), ("tokens", "text", "finish reason"), 0),
    ],
)
def test_every_part_of_an_output_is_compared(
    output: Output, what: tuple[str, ...], token: int | None
) -> None:
    assert output.differences(_output()) == what
    assert output.first_difference(_output()) == token


def test_a_mismatch_is_found_under_the_condition_and_prompt_where_it_is() -> None:
    state = State(CONFIGURATION)
    for prompt in range(3):
        for mode in MODES:
            state.add(_marked(REFERENCE, Subject(prompt, mode), _output()))
            wrong = (prompt, mode) == (1, "sampled")
            state.add(_marked(CROWD_8, Subject(prompt, mode), _output(ids=(1, 9) if wrong else (1, 2, 3))))
    assert matrix.mismatches(state) == [matrix.Mismatch(CROWD_8.name, Subject(1, "sampled"), ("tokens",), 1)]


def test_stock_outputs_are_no_mismatches_but_counted() -> None:
    state = State(CONFIGURATION)
    subject = Subject(0, "greedy")
    state.add(_stock(REFERENCE, subject, _output()))
    state.add(_stock(CROWD_8, subject, _output(ids=(1, 2, 9))))
    state.add(_stock(CROWD_8, subject, _output()))
    state.add(_stock(CROWD_8, Subject(1, "greedy"), _output()))  # without a reference
    assert matrix.mismatches(state) == []
    assert matrix.stock_differences(state, CROWD_8.name) == [2, None]


# Planning


@pytest.mark.parametrize("condition", CONDITIONS, ids=lambda c: c.name)
@pytest.mark.parametrize("prompts", [1, 2, 7, 64])
def test_every_prompt_is_checked_once_in_crowds_of_the_right_size(condition: Condition, prompts: int) -> None:
    crowds = matrix.plan(condition, prompts, MODES, State(CONFIGURATION))
    checked = [subject for crowd in crowds for subject in crowd.checked]
    assert sorted(checked) == sorted(matrix.subjects_of(condition, prompts, MODES))
    for crowd in crowds:
        assert len(crowd.checked) + len(crowd.stock) + crowd.fillers == condition.crowd
        assert set(crowd.stock) <= set(matrix.stock_subjects(prompts))
        if condition.crowd > 1:
            assert len(crowd.stock) + crowd.fillers > 0, "unmarked neighbours are the point of a crowd"


@pytest.mark.parametrize("name", ["crowd-3", "crowd-8", "crowd-17"])
def test_neighbours_are_stock_prompts_and_top_p(name: str) -> None:
    condition = next(c for c in CONDITIONS if c.name == name)
    crowds = matrix.plan(condition, 64, MODES, State(CONFIGURATION))
    assert sum(len(crowd.stock) for crowd in crowds) > 0
    assert sum(crowd.fillers for crowd in crowds) > 0


def test_every_prompt_meets_every_level() -> None:
    everywhere = [c for c in CONDITIONS if c.stride == 1]
    assert {c.crowd for c in everywhere} == {1, 3, 8, 17}
    assert {c.warm for c in everywhere} == {True, False}
    assert {c.restart for c in everywhere} == {True, False}


def test_stock_prompts_run_alone_once() -> None:
    state = State(CONFIGURATION)
    crowds = matrix.plan(REFERENCE, 64, MODES, state)
    assert [s for crowd in crowds for s in crowd.stock] == matrix.stock_subjects(64)
    _finish(crowds, state)
    assert set(state.stock_reference()) == set(matrix.stock_subjects(64))


def test_only_what_is_missing_is_planned() -> None:
    state = State(CONFIGURATION)
    first = matrix.plan(CROWD_8, 64, MODES, state)
    assert matrix.plan(CROWD_8, 64, MODES, state) == first
    _finish(first[:5], state)
    rest = matrix.plan(CROWD_8, 64, MODES, state)
    done = {subject for crowd in first[:5] for subject in crowd.checked}
    left = [subject for crowd in rest for subject in crowd.checked]
    assert done.isdisjoint(left)
    assert len(done) + len(left) == 128
    _finish(rest, state)
    assert matrix.plan(CROWD_8, 64, MODES, state) == []


def test_more_prompts_later_keep_what_is_there() -> None:
    state = State(CONFIGURATION)
    for condition in CONDITIONS:
        _finish(matrix.plan(condition, 8, MODES, state), state)
        assert matrix.plan(condition, 8, MODES, state) == []
    more = [s for crowd in matrix.plan(CROWD_8, 16, MODES, state) for s in crowd.checked]
    assert {subject.prompt for subject in more} == set(range(8, 16))


# Running on several servers


class _Runner:
    """Runs crowds without a server; fails at the one that ``fails_at`` counts to."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.seen: list[tuple[int, Crowd]] = []
        self._lock = threading.Lock()

    def run(self, server: object, number: int, crowd: Crowd) -> dict[str, Any]:
        with self._lock:
            self.seen.append((number, crowd))
            if len(self.seen) == self.fails_at:
                raise serving.ServingError("no")
        time.sleep(0.001)
        rows = [matrix.output_row(s, True, _output()) for s in crowd.checked]
        return _line(crowd.condition, rows, number)


def test_servers_share_the_crowds() -> None:
    state, runner = State(CONFIGURATION), _Runner()
    crowds = matrix.plan(CROWD_8, 64, MODES, state)
    work = matrix.Work(runner, state, matrix.Progress(crowds, 2))
    work.run(crowds, {3: None, 4: None})
    assert {number for number, _ in runner.seen} == {3, 4}
    assert len(runner.seen) == len(crowds) and matrix.plan(CROWD_8, 64, MODES, state) == []


def test_a_failing_crowd_ends_the_work_and_loses_nothing_else() -> None:
    state, runner = State(CONFIGURATION), _Runner(fails_at=4)
    crowds = matrix.plan(CROWD_8, 64, MODES, state)
    with pytest.raises(serving.ServingError):
        matrix.Work(runner, state, matrix.Progress(crowds, 2)).run(crowds, {0: None, 1: None})
    assert len(runner.seen) < len(crowds)
    assert len(state.crowds) == len(runner.seen) - 1


# Resuming


def test_results_survive_a_restart_of_the_program(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "state.jsonl"
    state = State.open(path, CONFIGURATION)
    _finish(matrix.plan(REFERENCE, 4, MODES, state), state)
    again = State.open(path, json.loads(json.dumps(CONFIGURATION)))
    assert again.marked == state.marked
    assert again.stock == state.stock
    assert again.crowds == state.crowds
    assert next(iter(again.marked.values())).meta == _output().meta
    assert again.servers == 1


def test_a_line_cut_off_by_a_crash_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    state = State.open(path, CONFIGURATION)
    for prompt in range(2):
        state.add(_marked(REFERENCE, Subject(prompt, "greedy"), _output()))
    path.write_text(path.read_text()[:-20])
    again = State.open(path, CONFIGURATION)
    assert set(again.marked) == {(REFERENCE.name, Subject(0, "greedy"))}
    again.add(_marked(REFERENCE, Subject(1, "greedy"), _output()))
    assert len(State.open(path, CONFIGURATION).marked) == 2


def test_results_of_another_configuration_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "state.jsonl"
    State.open(path, CONFIGURATION)
    with pytest.raises(state_file.StateError, match=r"max_new_tokens.*--state"):
        State.open(path, CONFIGURATION | {"max_new_tokens": 9})


@pytest.mark.parametrize("text", ["not json\n", "\n", '{"a": 1}\nnot json\n'])
def test_a_damaged_state_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "state.jsonl"
    path.write_text(text)
    with pytest.raises(state_file.StateError):
        State.open(path, {"a": 1})


# Report


def _report(state: State) -> str:
    return matrix.report(state, "the command", {"CPU": "a processor"}, [10] * 63 + [500])


def _row(text: str, table: str, condition: Condition) -> list[str]:
    section = text.split(f"## {table}")[1].split("\n## ")[0]
    line = next(line for line in section.splitlines() if line.startswith(f"| {condition.text} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_report_of_a_full_run() -> None:
    state = State(CONFIGURATION)
    for condition in CONDITIONS:
        _finish(matrix.plan(condition, 64, MODES, state), state)
    text = _report(state)
    compared = sum(len(matrix.subjects_of(c, 64, MODES)) for c in CONDITIONS[1:])
    assert f"**0 mismatches in {compared} comparisons** of deterministic outputs of 64 chat prompts" in text
    assert "64, 10 to 500 tokens" in text
    assert "the command" in text
    assert _row(text, "Deterministic", REFERENCE)[0] == "128 references"
    assert _row(text, "Deterministic", CROWD_8) == ["128", "0", "0", "0", str(128 * 5)]
    assert _row(text, "Stock", REFERENCE)[0] == "16 references"
    assert "## Mismatches" not in text


def test_report_shows_mismatches_and_work() -> None:
    state = State(CONFIGURATION)
    subject = Subject(3, "greedy")
    state.add(_marked(REFERENCE, subject, _output()))
    state.add(_marked(CROWD_8, subject, _output(ids=(1, 9, 3), text="axc")))
    state.add(_stock(REFERENCE, subject, _output()))
    state.add(_stock(CROWD_8, subject, _output(ids=(1, 2, 9))))
    text = _report(state)
    assert "**1 mismatches in 1 comparisons**" in text
    assert "Of 1 stock outputs compared in the same way, 1 differ." in text
    assert _row(text, "Deterministic", CROWD_8) == ["1", "1", "1", "0", "5"]
    assert _row(text, "Stock", CROWD_8) == ["1", "1", "2"]
    assert "| restart-crowd-8 | 3 | greedy | tokens, text | 1 |" in text
    # Two crowds of 2 s with 3 tokens of output and 11 of fillers each.
    work = ["1 of 1", "1", "2", "90.0 %", "40", "30", "14", "7.0", "0:04"]
    assert _row(text, "Decode", CROWD_8) == work


def test_report_of_nothing() -> None:
    assert "**0 mismatches in 0 comparisons**" in _report(State(CONFIGURATION))


def test_files_are_not_part_of_the_command() -> None:
    words = ["--prompts", "8", "--state", "/a/b", "--report=/c d", "--report-only", "--", "--tp", "2"]
    assert matrix.command_line(words) == "python scripts/determinism_matrix.py --prompts 8 -- --tp 2"


def test_machine_names_no_host() -> None:
    import socket

    assert socket.gethostname() not in json.dumps(serving.machine())


# Prompts


def test_prompts_are_complete_and_all_different() -> None:
    data = json.loads(serving.PROMPTS_FILE.read_text())
    chats = [json.dumps(serving.messages(data, prompt)) for prompt in data["prompts"]]
    assert len(chats) == len(set(chats)) == 64
    assert len({len(prompt) for prompt in data["prompts"]}) == 3, "some have a system prompt, some a document"
