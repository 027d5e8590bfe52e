"""Which candidates are verified soon because they may end the output."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ext.llm42.scheduler_hooks import _may_end


def _request(ignore_eos: bool = False, tokenizer: bool = True) -> Any:
    params = SimpleNamespace(ignore_eos=ignore_eos, stop_token_ids={3})
    known = SimpleNamespace(eos_token_id=1, additional_stop_token_ids={7, 8})
    return SimpleNamespace(sampling_params=params, eos_token_ids={2}, tokenizer=known if tokenizer else None)


@pytest.mark.parametrize(
    ("req", "ends"),
    [
        (_request(), {1, 2, 3, 7, 8}),
        (_request(tokenizer=False), {2, 3}),
        (_request(ignore_eos=True), set()),
    ],
    ids=["all that SGLang stops at", "no tokenizer", "end of sequence ignored"],
)
def test_tokens_that_may_end_the_output(req: Any, ends: set[int]) -> None:
    assert {token for token in range(10) if _may_end(req, token)} == ends


def test_nothing_named() -> None:
    req = _request(tokenizer=False)
    req.eos_token_ids = req.sampling_params.stop_token_ids = None
    assert not any(_may_end(req, token) for token in range(10))
