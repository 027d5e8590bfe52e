"""Flags of TokenWeave and what refuses a server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sglang_ext.tokenweave import runtime
from sglang_ext.tokenweave.batch import BatchCutError, _locate
from sglang_ext.tokenweave.config import TokenWeaveConfig
from sglang_ext.tokenweave.tune import layer_of_config


def test_absent_flags_keep_their_defaults() -> None:
    assert TokenWeaveConfig.from_server_args(SimpleNamespace()) == TokenWeaveConfig()


def test_flags_are_read() -> None:
    given = SimpleNamespace(enable_tokenweave=True, tokenweave_ctas=4, tokenweave_table="/x", unrelated=1)
    expected = replace(TokenWeaveConfig(), enabled=True, ctas=4, table=Path("/x"))
    assert TokenWeaveConfig.from_server_args(given) == expected


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("split", "half"),
        ("path", "nccl"),
        ("min_tokens", 1),
        ("ctas", 0),
        ("fused_ctas", 129),
        ("barrier_timeout", 0.0),
    ],
)
def test_values_out_of_range_name_their_flag(flag: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"--tokenweave-{flag.replace('_', '-')}"):
        TokenWeaveConfig.from_server_args(SimpleNamespace(**{f"tokenweave_{flag}": value}))


WEAVABLE = {
    "tp_size": 2,
    "pp_size": 1,
    "enable_dp_attention": False,
    "enable_two_batch_overlap": False,
    "enable_torch_compile": False,
    "enable_lora": None,
    "lora_paths": None,
}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"tp_size": 1}, "only one tensor-parallel rank"),
        ({"pp_size": 2}, "pipeline parallelism"),
        ({"enable_dp_attention": True}, "DP attention"),
        ({"enable_two_batch_overlap": True}, "two-batch-overlap"),
        ({"enable_torch_compile": True}, "torch-compile"),
        ({"enable_lora": True}, "LoRA"),
    ],
)
def test_servers_that_run_stock_say_why(change: dict[str, object], reason: str | None) -> None:
    given = runtime.stock_reason(SimpleNamespace(**{**WEAVABLE, **change}))
    assert given is None if reason is None else reason in (given or "")


@pytest.mark.parametrize(("cut", "place"), [(1, (0, 1)), (4, (0, 4)), (5, (1, 0)), (6, (2, 0)), (8, (2, 2))])
def test_place_of_a_cut(cut: int, place: tuple[int, int]) -> None:
    assert _locate([5, 1, 3], cut) == place


def test_a_cut_in_the_padding_is_refused() -> None:
    with pytest.raises(BatchCutError, match="end at token 9, before the cut at 9"):
        _locate([5, 1, 3], 9)


def test_experts_count_as_those_that_one_token_uses() -> None:
    config = {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    }
    shape = layer_of_config(config, world=4)
    assert shape.mlp[0].n == 2 * 8 * 768 // 4 and shape.mlp[1].k == 8 * 768 // 4
    with pytest.raises(ValueError, match="no 'hidden_size'"):
        layer_of_config({"num_attention_heads": 4}, world=1)
