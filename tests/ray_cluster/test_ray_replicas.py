"""Replicas behind one address: command lines, and the comparison before the address opens."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_ext.ray import agreement, replicas


def _info(fingerprint: str = "ab", configuration: str = "cd", version: str = "0.5.17") -> dict[str, Any]:
    state = {"llm42_fingerprint": fingerprint, "llm42_configuration": configuration}
    return {"version": version, "internal_states": [state, dict(state)]}


def test_equal_replicas_are_accepted() -> None:
    replicas.compare({"http://a": _info(), "http://b": _info()})
    replicas.compare({"http://a": {"internal_states": [{}]}, "http://b": {"internal_states": [{}]}})


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (_info(fingerprint="xy"), "llm42_fingerprint"),
        (_info(configuration="xy"), "llm42_configuration"),
        (_info(version="0.5.18"), "version"),
    ],
)
def test_replicas_that_differ_are_named(other: dict[str, Any], name: str) -> None:
    with pytest.raises(agreement.Disagreement, match=rf"replicas .*{name}: .* on http://a, .* on http://b"):
        replicas.compare({"http://a": _info(), "http://b": other})


def test_ranks_of_one_replica_must_agree_with_those_of_the_others() -> None:
    mixed = _info()
    mixed["internal_states"][1]["llm42_fingerprint"] = "xy"
    with pytest.raises(agreement.Disagreement, match="llm42_fingerprint"):
        replicas.compare({"http://a": _info(), "http://b": mixed})


def test_the_address_is_on_loopback_unless_told() -> None:
    options, _ = replicas.parse(["--replicas", "2", "--", "--model-path", "m"])
    command = replicas.front_command(options, ["http://a", "http://b"])
    assert command[command.index("--host") + 1] == "127.0.0.1"
    at = command.index("sglang_ext.ray.front")
    assert command[at + 1 : at + 3] == ["http://a", "http://b"] and "--share-port" not in command
    options, _ = replicas.parse(["--replicas", "2", "--fronts", "3", "--", "--model-path", "m"])
    assert "--share-port" in replicas.front_command(options, ["http://a"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--", "--model-path", "m"], "--replicas"),
        (["--replicas", "0", "--", "--model-path", "m"], "--replicas must be at least 1"),
        (["--replicas", "2", "--fronts", "0", "--", "--model-path", "m"], "--fronts must be at least 1"),
        (["--replicas", "2"], "behind --"),
        (["--replicas", "2", "--", "--port", "1"], "--port is chosen"),
        (["--replicas", "2", "--", "--host=0.0.0.0"], "--host is chosen"),
        (["--replicas", "2", "--", "--ssl-keyfile=k"], "--ssl-keyfile: the front speaks plain HTTP"),
        (["--replicas", "2", "--policy", "luck", "--", "--model-path", "m"], "--policy"),
    ],
)
def test_wrong_command_lines_are_named(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        replicas.parse(argv)
    assert error.value.code == 2 and words in capsys.readouterr().err
