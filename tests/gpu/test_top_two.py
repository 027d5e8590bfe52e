"""The kernel that finds each row's winner, against plain PyTorch."""

from __future__ import annotations

import pytest
import torch

from sglang_ext.llm42 import sampling

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 4096), (5, 4097), (33, 128256)])
@pytest.mark.parametrize("values", ["random", "ties", "mostly minus infinity"])
def test_as_plain_pytorch(dtype: torch.dtype, shape: tuple[int, int], values: str) -> None:
    from sglang_ext.llm42.top_two import top_two

    torch.manual_seed(shape[1])
    logits = torch.randn(shape, device="cuda")
    if values == "ties":
        logits = (logits * 2).round()
    elif values != "random":
        logits[:, 1:] = logits[:, 1:].masked_fill(torch.rand(shape, device="cuda")[:, 1:] < 0.999, -torch.inf)
    logits = logits.to(dtype)
    tokens, leads = top_two(logits)
    assert torch.equal(tokens, sampling._argmax_lowest(logits))
    assert torch.equal(leads, sampling._lead(logits))


def test_rows_that_are_a_part_of_longer_ones() -> None:
    from sglang_ext.llm42.top_two import top_two

    logits = torch.randn(9, 1000, device="cuda")[:, :777]
    assert torch.equal(top_two(logits)[0], sampling._argmax_lowest(logits))


def test_a_row_without_a_number_gives_some_token() -> None:
    from sglang_ext.llm42.top_two import top_two

    for value in (float("nan"), float("-inf")):
        tokens, _ = top_two(torch.full((2, 5000), value, device="cuda"))
        assert all(0 <= token < 5000 for token in tokens.tolist())
