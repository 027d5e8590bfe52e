"""The command line of python -m sglang_ext.ray.submit, and what Ray is asked for."""

from __future__ import annotations

import pytest

from sglang_ext.ray import submit


def test_the_job_runs_the_server_on_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setenv("HF_TOKEN", "secret")
    options, flags = submit.parse(["--submission-id", "x", "--", "--model-path", "a b", "--nnodes", "2"])
    request = submit.request(options, flags)
    assert (
        request["entrypoint"] == "python -m sglang_ext.launch_server --use-ray --model-path 'a b' --nnodes 2"
    )
    assert request["submission_id"] == "x" and request["entrypoint_resources"] is None
    assert request["runtime_env"]["env_vars"]["NCCL_DEBUG"] == "INFO"
    assert (
        "HF_TOKEN" not in request["runtime_env"]["env_vars"] and "working_dir" not in request["runtime_env"]
    )


def test_where_the_server_runs_can_be_told() -> None:
    options, flags = submit.parse(
        ["--entrypoint-resources", '{"head": 0.5}', "--", "--use-ray", "--port", "1"]
    )
    assert submit.request(options, flags)["entrypoint_resources"] == {"head": 0.5}
    assert flags == ["--use-ray", "--port", "1"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model-path", "m"], "unrecognized arguments"),
        ([], "behind --"),
        (["--", "--api-key", "k"], "--api-key: Ray shows"),
        (["--", "--admin-api-key=k"], "--admin-api-key: Ray shows"),
        (["--entrypoint-resources", "[1]", "--", "--port", "1"], "--entrypoint-resources"),
    ],
)
def test_wrong_command_lines_are_named(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        submit.parse(argv)
    assert error.value.code == 2 and words in capsys.readouterr().err
