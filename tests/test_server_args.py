"""Our command-line flags: parsing, refusals, the way to other processes, and the launcher's messages."""

from __future__ import annotations

import argparse
import os
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.configs.model_config import AttentionArch
from transformers import LlamaConfig

from sglang_ext import hooks, launch_server
from sglang_ext.llm42 import requirements
from sglang_ext.llm42.config import Llm42Config
from sglang_ext.llm42.server import refusals

hooks.install(hooks.Feature.FLAGS)

from sglang.srt import server_args as sglang_server_args  # noqa: E402

from sglang_ext.server_args import ServerArgs  # noqa: E402

#: A model path for which SGLang resolves nothing, so that arguments are fast to make.
DUMMY = "dummy"


def _parse(*flags: str) -> ServerArgs:
    return sglang_server_args.prepare_server_args(["--model", DUMMY, *flags])  # type: ignore[return-value]


def test_class_is_in_place_everywhere() -> None:
    from sglang.srt.entrypoints.engine import Engine

    assert sglang_server_args.ServerArgs is ServerArgs
    assert Engine.server_args_class is ServerArgs


def test_flags_reach_the_arguments() -> None:
    args = _parse(
        *("--enable-llm42", "--llm42-window-size", "16", "--llm42-verify-batch-size", "2"),
        *("--llm42-max-wait-steps", "7", "--llm42-mark-all", "--max-running-requests", "5"),
        "--llm42-disable-overlap-verification",
    )
    assert isinstance(args, ServerArgs)
    assert args.enable_llm42 is True
    assert (args.llm42_window_size, args.llm42_verify_batch_size, args.llm42_max_wait_steps) == (16, 2, 7)
    assert args.llm42_mark_all is True
    assert args.llm42_disable_overlap_verification is True
    assert Llm42Config.from_server_args(args).overlap_verification is False
    assert args.max_running_requests == 5


def test_defaults() -> None:
    args = _parse()
    assert args.enable_llm42 is False
    assert (args.llm42_window_size, args.llm42_verify_batch_size) == (64, 8)
    assert args.llm42_mark_all is False
    assert Llm42Config.from_server_args(args).overlap_verification is True


@pytest.mark.parametrize("mode", ["1", "2", "3"])
def test_mode_numbers_of_the_original(mode: str) -> None:
    assert _parse("--enable-llm42", mode).enable_llm42 is True
    assert ServerArgs(model_path=DUMMY, enable_llm42=int(mode)).enable_llm42 is True


@pytest.mark.parametrize("value", [0, 4, -1, "x", "1", 1.0])
def test_nonsense_mode_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="--enable-llm42"):
        ServerArgs(model_path=DUMMY, enable_llm42=value)


@pytest.mark.parametrize("value", ["0", "4", "x"])
def test_nonsense_mode_is_refused_on_the_command_line(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        _parse("--enable-llm42", value)
    assert exit_info.value.code == 2
    assert "--enable-llm42" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("llm42_window_size", [0, -1, requirements.MAX_WINDOW_SIZE + 1, True, "8"]),
        ("llm42_verify_batch_size", [0, -8, 1.5]),
        ("llm42_max_wait_steps", [-1, None]),
    ],
)
def test_nonsense_numbers_are_refused(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match="--" + field.replace("_", "-")):
            ServerArgs(model_path=DUMMY, **{field: value})


def test_edges_are_accepted() -> None:
    ServerArgs(model_path=DUMMY, llm42_window_size=1, llm42_verify_batch_size=1, llm42_max_wait_steps=0)
    ServerArgs(model_path=DUMMY, llm42_window_size=requirements.MAX_WINDOW_SIZE)


def test_mark_all_needs_the_feature() -> None:
    with pytest.raises(ValueError, match="--llm42-mark-all needs --enable-llm42"):
        ServerArgs(model_path=DUMMY, llm42_mark_all=True)


def test_commit_log_flags_reach_the_arguments(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    args = _parse(
        *("--enable-llm42", "--llm42-commit-log", str(path)),
        *("--llm42-commit-log-max-bytes", "4096", "--llm42-commit-log-keep", "2"),
    )
    assert args.llm42_commit_log == str(path)
    assert (args.llm42_commit_log_max_bytes, args.llm42_commit_log_keep) == (4096, 2)
    assert not path.exists(), "the scheduler makes it"
    assert _parse().llm42_commit_log is None


@pytest.mark.parametrize("field", ["llm42_commit_log_max_bytes", "llm42_commit_log_keep"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, None])
def test_nonsense_sizes_of_the_commit_log_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="--" + field.replace("_", "-") + " must be at least 1"):
        ServerArgs(model_path=DUMMY, **{field: value})


def test_commit_log_needs_the_feature(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--llm42-commit-log needs --enable-llm42"):
        ServerArgs(model_path=DUMMY, llm42_commit_log=str(tmp_path / "log"))


@pytest.mark.parametrize(("name", "reason"), [("", "is a folder"), ("no/log", "there is no folder")])
def test_commit_log_that_cannot_be_written_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    path = str(tmp_path / name)
    with pytest.raises(ValueError, match=f"--llm42-commit-log {path}.*{reason}"):
        ServerArgs(model_path=DUMMY, enable_llm42=True, llm42_commit_log=path)


@pytest.mark.parametrize("denied", ["folder", "file"])
def test_commit_log_without_permission_is_refused(
    tmp_path: Path, denied: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Permissions do not bind the superuser, so what the system answers is replaced."""
    path = tmp_path / "log"
    path.touch()
    refused = {"folder": tmp_path, "file": path}[denied]
    access = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: p != refused and access(p, mode))
    with pytest.raises(ValueError, match=f"the {denied} .*cannot be written"):
        ServerArgs(model_path=DUMMY, enable_llm42=True, llm42_commit_log=str(path))


#: One setting for each refused flag; the test below checks that no row is left out.
REFUSED: list[dict[str, Any]] = [
    {"speculative_algorithm": "NGRAM"},
    {"pp_size": 2},
    {"enable_mixed_chunk": True},
    {"enable_dp_attention": True},
    {"enable_prefill_cp": True},
    {"ep_size": 2},
    {"moe_a2a_backend": "deepep"},
    {"enable_eplb": True},
    {"elastic_ep_backend": "mooncake"},
    {"moe_dp_size": 2},
    {"kt_weight_path": "weights"},
    {"enable_hierarchical_cache": True},
    {"enable_hisparse": True},
    {"enable_lmcache": True},
    {"enable_flexkv": True},
    {"radix_cache_backend": "mine"},
    {"enable_streaming_session": True},
    {"disaggregation_mode": "prefill"},
    {"enable_deterministic_inference": True},
    {"enable_lora": True},
    {"enable_return_routed_experts": True},
    {"enable_symm_mem": True, "tp_size": 4},
    {"enable_two_batch_overlap": True},
    {"enable_pdmux": True},
    {"tokenizer_worker_num": 2},
    {"smg_grpc_mode": True},
    {"attention_backend": "fa3", "device": "cuda"},
    {"kv_cache_dtype": "fp8_e5m2"},
    {"dllm_algorithm": "LowConfidence"},
    {"is_embedding": True},
    {"encoder_only": True},
]


@pytest.mark.parametrize("setting", REFUSED, ids=lambda setting: next(iter(setting)))
def test_unsupported_flags_are_refused_by_name(setting: dict[str, Any]) -> None:
    flag = "--" + next(iter(setting)).replace("_", "-")
    flag = {"--pp-size": "--pp-size > 1"}.get(flag, flag)
    with pytest.raises(ValueError, match=flag) as error:
        ServerArgs(model_path=DUMMY, enable_llm42=True, **setting)
    assert str(error.value).count("--enable-llm42") == 1, "one sentence"
    ServerArgs(model_path=DUMMY, **setting)


def test_every_refused_flag_is_tried() -> None:
    found = {row.what for s in REFUSED for row in requirements.FLAGS if row.applies(_plain_arguments(**s))}
    assert found == {row.what for row in requirements.FLAGS}
    assert not [row.what for row in requirements.FLAGS if row.applies(_plain_arguments())]


def test_the_documentation_gives_the_reason_for_every_refusal() -> None:
    text = (Path(__file__).parents[1] / "docs/refused.md").read_text()
    for row in (*requirements.FLAGS, *requirements.MODELS):
        assert f"\n| {row.what} | {row.reason} | " in text, row.what
    for refusal in refusals.REFUSED_PER_REQUEST:
        assert f"\n| `{refusal.field}` | {refusal.reason} |\n" in text, refusal.field


@pytest.mark.parametrize(
    ("settings", "works"),
    [
        ({"attention_backend": "flashinfer"}, True),
        ({"attention_backend": "triton"}, False),
        ({"attention_backend": "flashinfer", "decode_attention_backend": "fa3"}, False),
        ({"attention_backend": "fa3", "prefill_attention_backend": "flashinfer"}, False),
        ({"prefill_attention_backend": "flashinfer", "decode_attention_backend": "flashinfer"}, True),
    ],
)
def test_a_gpu_needs_flashinfer(settings: dict[str, Any], works: bool) -> None:
    found = requirements.unsupported(_plain_arguments(device="cuda", **settings))
    assert not found if works else "--attention-backend other than flashinfer" in " ".join(found)
    assert not requirements.unsupported(_plain_arguments(device="cpu", **settings)), "a CPU has its own"


@pytest.mark.parametrize(
    ("device", "capabilities", "named"),
    [
        ("cuda", [(9, 0), (9, 0)], None),
        ("cuda", [(9, 0), (8, 0)], "GPU 1 (8.0)"),
        ("cuda", [(10, 0)], "GPU 0 (10.0)"),
        ("cuda", [], None),
        ("cpu", [(8, 0)], None),
    ],
)
def test_a_gpu_must_be_hopper(
    device: str, capabilities: list[tuple[int, int]], named: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = _plain_arguments(device=device, attention_backend="flashinfer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", "GPU {}".format)
    found = requirements.unsupported(arguments)
    assert found == [] if named is None else named in "".join(found)


@pytest.mark.parametrize(
    ("settings", "gpus", "backend"),
    [
        ({"device": "cuda"}, True, "flashinfer"),
        ({"device": None}, True, "flashinfer"),
        ({"device": None}, False, None),
        ({"device": "cpu"}, True, None),
        ({"device": "cuda", "attention_backend": "fa3"}, True, "fa3"),
        ({"device": "cuda", "decode_attention_backend": "flashinfer"}, True, "flashinfer"),
    ],
)
def test_a_gpu_gets_flashinfer_where_no_backend_was_asked_for(
    settings: dict[str, Any], gpus: bool, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    arguments = _plain_arguments(**settings)
    ServerArgs._choose_flashinfer(arguments)
    assert arguments.attention_backend == backend


def test_sessions_in_the_radix_cache_are_refused() -> None:
    with pytest.raises(ValueError, match="--enable-session-radix-cache"):
        ServerArgs(model_path=DUMMY, enable_llm42=True, enable_session_radix_cache=True)


def _plain_arguments(**settings: Any) -> ServerArgs:
    return ServerArgs(model_path=DUMMY, **settings)


def test_mark_in_preferred_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="--llm42-mark-all"):
        ServerArgs(
            model_path=DUMMY,
            enable_llm42=True,
            preferred_sampling_params={"is_deterministic": True},  # type: ignore[arg-type]
        )


LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "original_max_position_embeddings": 1024,
    "short_factor": [1.0] * 64,
    "long_factor": [2.0] * 64,
}


def _model(**traits: Any) -> Any:
    from sglang.srt.configs.linear_attn_model_registry import get_linear_attn_config

    hf_config = LlamaConfig(architectures=["LlamaForCausalLM"], **traits.pop("text", {}))
    config: dict[str, Any] = {
        "is_hybrid_swa": False,
        "sliding_window_size": None,
        "is_encoder_decoder": False,
        "attention_arch": AttentionArch.MHA,
    }
    config["linear_attn_registry_result"] = get_linear_attn_config(hf_config)
    config |= {"hf_config": hf_config, "hf_text_config": hf_config, "is_draft_model": False}
    return types.SimpleNamespace(**config | traits)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (_model(is_hybrid_swa=True), "sliding-window"),
        (_model(sliding_window_size=4096), "sliding-window"),
        (_model(text={"rope_parameters": LONG_ROPE}), "LongRoPE"),
        (_model(hf_text_config=types.SimpleNamespace(rope_scaling={"type": "longrope"})), "LongRoPE"),
        (_model(is_encoder_decoder=True), "encoder-decoder"),
        (_model(attention_arch=AttentionArch.MLA), "latent attention"),
    ],
)
def test_unsupported_models_are_refused(config: Any, what: str) -> None:
    args = types.SimpleNamespace(model_path="a-model", get_model_config=lambda: config)
    (reason,) = requirements.unsupported_model(args)  # type: ignore[arg-type]
    assert what in reason and "--enable-llm42" in reason


def test_plain_models_are_accepted() -> None:
    unused_window = _model(sliding_window_size=4096, text={"use_sliding_window": False})
    for config in (_model(), _model(text={"num_experts": 8}), unused_window):
        args = types.SimpleNamespace(model_path="a-model", get_model_config=lambda config=config: config)
        assert requirements.unsupported_model(args) == []  # type: ignore[arg-type]


def test_state_space_models_are_refused() -> None:
    from sglang.srt.configs import FalconH1Config

    config = _model()
    config.hf_config = FalconH1Config()
    args = types.SimpleNamespace(model_path="a-model", get_model_config=lambda: config)
    reasons = requirements.unsupported_model(args)  # type: ignore[arg-type]
    assert any("state-space" in reason for reason in reasons)


def test_arguments_survive_the_way_to_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    args = ServerArgs(model_path=DUMMY, enable_llm42=True, llm42_window_size=16)
    sent = pickle.dumps(args)
    installed: list[hooks.Feature] = []
    monkeypatch.setattr(hooks, "install", installed.append)
    received = pickle.loads(sent)
    assert received == args and received.llm42_window_size == 16
    assert installed == [hooks.Feature.FLAGS], "a process that unpickles the arguments needs our hooks"


def test_help_shows_our_flags_in_their_own_group() -> None:
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    text = parser.format_help()
    group = text[text.index("LLM-42 (sglang_ext)") :]
    for flag in ("--enable-llm42", "--llm42-window-size", "--llm42-verify-batch-size", "--llm42-mark-all"):
        assert text.count(f"  {flag}") == 1 and f"  {flag}" in group


# The launcher


def test_launcher_refuses_another_sglang_version(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(hooks, "sglang_version", lambda: "0.6.0")
    assert launch_server.main(["--model", DUMMY]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "0.6.0" in error


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--enable-llm42", "7"], "--enable-llm42"),
        (["--enable-llm42", "--pp-size", "2"], "--pp-size"),
        (["--llm42-window-size", "many"], "--llm42-window-size"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_launcher_names_the_wrong_argument_in_one_line(
    flags: list[str], named: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch_server, "_serve", lambda args: pytest.fail("started"))
    try:
        status = launch_server.main(["--model", DUMMY, *flags])
    except SystemExit as exit_info:
        status = exit_info.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert status == 2
    assert named in error and error.count("\n") == 1, error


def test_launcher_serves_what_was_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[ServerArgs] = []
    monkeypatch.setattr(launch_server, "_serve", served.append)
    assert launch_server.main(["--model", DUMMY, "--enable-llm42"]) == 0
    assert served[0].enable_llm42 is True


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--model", "smollm2"], ["--model", "/made", "--served-model-name", "smollm2"]),
        (["--model-path=smollm2"], ["--model-path=/made", "--served-model-name", "smollm2"]),
        (
            ["--model", "smollm2", "--served-model-name", "demo"],
            ["--model", "/made", "--served-model-name", "demo"],
        ),
        (["--model", "./smollm2"], ["--model", "./smollm2"]),
        (
            ["--model", "other", "--tokenizer-path", "smollm2"],
            ["--model", "other", "--tokenizer-path", "smollm2"],
        ),
    ],
)
def test_demo_model_alias(given: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang_ext import demo_model

    assert demo_model.DEMO_MODEL_NAME == launch_server.DEMO_MODEL
    monkeypatch.setattr(demo_model, "resolve", lambda name: "/made")
    assert launch_server.with_demo_model(given) == expected


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("tokenweave_split", "half", "--tokenweave-split"),
        ("tokenweave_canonical_split", "auto", "--tokenweave-canonical-split"),
        ("tokenweave_path", "nvlink", "--tokenweave-path"),
        ("tokenweave_min_tokens", 1, "--tokenweave-min-tokens"),
        ("tokenweave_ctas", 0, "--tokenweave-ctas"),
        ("tokenweave_barrier_timeout", 0.0, "--tokenweave-barrier-timeout"),
    ],
)
def test_nonsense_for_tokenweave_is_refused_by_name(field: str, value: Any, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        ServerArgs(model_path=DUMMY, **{field: value})


def test_tokenweave_flags_reach_its_configuration() -> None:
    from sglang_ext.tokenweave.config import TokenWeaveConfig

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    given = ["--enable-tokenweave", "--tokenweave-split", "equal", "--no-tokenweave-reserve"]
    arguments = parser.parse_args(["--model-path", DUMMY, *given])
    config = TokenWeaveConfig.from_server_args(ServerArgs.from_cli_args(arguments))
    assert config == TokenWeaveConfig(enabled=True, split="equal", reserve=False)


def test_tokenweave_takes_the_place_of_flashinfers_fusion() -> None:
    assert ServerArgs(model_path=DUMMY, enable_tokenweave=True).enforce_disable_flashinfer_allreduce_fusion
    assert not ServerArgs(model_path=DUMMY).enforce_disable_flashinfer_allreduce_fusion
    with pytest.raises(ValueError, match="--flashinfer-allreduce-fusion-backend"):
        ServerArgs(model_path=DUMMY, enable_tokenweave=True, flashinfer_allreduce_fusion_backend="auto")
