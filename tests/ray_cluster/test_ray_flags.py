"""Flags of --use-ray: what is refused, with the flag named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_ext.ray import requirements
from sglang_ext.ray.requirements import RaySettings


def _args(**changes: Any) -> SimpleNamespace:
    defaults = {
        "use_ray": True,
        "nnodes": 1,
        "node_rank": 0,
        "tp_size": 1,
        "pp_size": 1,
        "dp_size": 1,
        "enable_dp_attention": False,
        "dist_init_addr": None,
        "base_gpu_id": 0,
        "gpu_id_step": 1,
        "tokenizer_worker_num": 1,
        "encoder_only": False,
        "smg_grpc_mode": False,
        "grpc_mode": False,
        "ray_address": None,
        "ray_namespace": None,
        "ray_placement_group": None,
        "ray_env": None,
        "ray_start_timeout": 10.0,
        "ray_on_failure": "exit",
        "ray_max_restarts": 3,
    }
    return SimpleNamespace(**{**defaults, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ray_on_failure": "ignore"}, "--ray-on-failure"),
        ({"ray_max_restarts": 0}, "--ray-max-restarts"),
        ({"ray_start_timeout": 0}, "--ray-start-timeout"),
        ({"ray_start_timeout": "soon"}, "--ray-start-timeout"),
        ({"ray_env": ["A=1"]}, "--ray-env 'A=1'"),
        ({"ray_address": "ray://head:10001"}, "--ray-address ray://head:10001"),
    ],
)
def test_values_without_sense_are_named(changes: dict[str, Any], words: str) -> None:
    (sentence,) = requirements.nonsense(_args(**changes))
    assert sentence.startswith(words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"node_rank": 1}, "--node-rank"),
        ({"dist_init_addr": "10.0.0.1:5000"}, "--dist-init-addr"),
        ({"gpu_id_step": 2}, "--gpu-id-step"),
        ({"tokenizer_worker_num": 2}, "--tokenizer-worker-num"),
        ({"encoder_only": True}, "--encoder-only"),
        ({"nnodes": 2}, "--nnodes 2"),
        ({"nnodes": 0}, "--nnodes"),
        ({"nnodes": 2, "tp_size": 3}, "--nnodes 2"),
        ({"nnodes": 2, "dp_size": 2}, "--nnodes 2"),
    ],
)
def test_flags_that_do_not_work_on_ray_are_named(changes: dict[str, Any], words: str) -> None:
    (sentence,) = requirements.unsupported(_args(**changes))
    assert words in sentence


@pytest.mark.parametrize("changes", [{}, {"nnodes": 2, "tp_size": 4}, {"tp_size": 2, "dp_size": 2}])
def test_what_works_is_not_refused(changes: dict[str, Any]) -> None:
    args = _args(**changes)
    assert (
        not requirements.nonsense(args)
        + requirements.unsupported(args)
        + requirements.needing_ray(_args(ray_start_timeout=RaySettings.start_timeout, use_ray=False))
    )


def test_ray_flags_need_ray() -> None:
    sentences = requirements.needing_ray(
        _args(use_ray=False, ray_start_timeout=RaySettings.start_timeout, ray_env=["A"], ray_max_restarts=1)
    )
    assert sentences == ["--ray-env needs --use-ray.", "--ray-max-restarts needs --use-ray."]


def test_ray_that_is_not_installed_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "ray_is_installed", lambda: False)
    (sentence,) = requirements.unsupported(_args())
    assert sentence == requirements.NOT_INSTALLED and "pip install" in sentence and "\n" not in sentence


def test_dp_attention_needs_no_more_ranks() -> None:
    assert requirements.world_size(_args(tp_size=4, dp_size=2)) == 8
    assert requirements.world_size(_args(tp_size=4, dp_size=2, enable_dp_attention=True)) == 4
