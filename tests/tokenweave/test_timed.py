"""Forward passes as the rule that learns sees them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ext.tokenweave import runtime, sglang_hooks
from sglang_ext.tokenweave.learned_rule import LearnedRule
from sglang_ext.tokenweave.runtime import Runtime


class Rule(LearnedRule):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def begin(self, tokens: int, prefix: int) -> None:
        self.told.append(("begin", tokens, prefix))

    def end(self, in_halves: bool) -> str | None:
        self.told.append(("end", in_halves))
        return "something"


@pytest.fixture
def rule() -> Rule:
    return Rule()


@pytest.fixture
def started(rule: Rule) -> Any:
    weaver: Any = SimpleNamespace(decide=rule, statistics=SimpleNamespace(woven=3), rank=0)
    made = object.__new__(Runtime)
    made.weaver = weaver
    return made


def _batch(tokens: int, prefixes: list[int], plain: bool = True) -> Any:
    mode = SimpleNamespace(
        is_extend=lambda: plain, is_target_verify=lambda: False, is_draft_extend_v2=lambda: False
    )
    return SimpleNamespace(input_ids=[0] * tokens, extend_prefix_lens_cpu=prefixes, forward_mode=mode)


@pytest.mark.parametrize("woven", [True, False])
def test_a_prefill_batch_is_timed_with_how_it_ran(
    started: Any, rule: Rule, woven: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def forward() -> str:
        assert rule.told == [("begin", 7, 30)]
        started.weaver.statistics.woven += woven
        return "output"

    with caplog.at_level("INFO", "sglang_ext"):
        assert started.timed(_batch(7, [10, 20]), forward) == "output"
    assert rule.told[1:] == [("end", woven)]
    assert "TokenWeave: something" in caplog.text


def test_decode_steps_graphs_and_other_rules_are_not(
    started: Any, rule: Rule, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert started.timed(_batch(7, [0], plain=False), lambda: 1) == 1
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_captures_graph", lambda: True)
        assert started.timed(_batch(7, [0]), lambda: 2) == 2
    started.weaver.decide = lambda tokens: pytest.fail("asked")
    assert started.timed(_batch(7, [0]), lambda: 3) == 3
    assert not rule.told


@pytest.mark.parametrize("draft", [True, False])
def test_the_hook_times_the_model_and_not_its_draft(
    started: Any, rule: Rule, draft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_runtime", started)
    model_runner, batch = SimpleNamespace(is_draft_worker=draft), _batch(7, [0])

    def original(*arguments: Any, **more: Any) -> Any:
        return arguments, more

    result = sglang_hooks.around_forward(original, model_runner, batch, 1, option=2)
    assert result == ((model_runner, batch, 1), {"option": 2})
    assert bool(rule.told) != draft
