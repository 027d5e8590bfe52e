"""Replicas behind one address: command lines, and the comparison before the address opens."""

from __future__ import annotations

from typing import Any

import pytest

from sglang_ext.ray import agreement, front, replicas


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
        ({**_info(), "llm42_window_size": 8}, "flags.llm42_window_size"),
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


class _Actor:
    """Stands for Ray's handle; ``ray.wait`` and ``ray.get`` are replaced, too."""

    def __init__(self, answer: object = None) -> None:
        self.answer = answer
        self.status = self

    def remote(self) -> _Actor:
        return self


@pytest.fixture
def _without_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def wait(actors: list[_Actor], **_: object) -> tuple[list[_Actor], list[_Actor]]:
        return [a for a in actors if a.answer != "silent"], [a for a in actors if a.answer == "silent"]

    def get(actor: _Actor, timeout: float) -> object:
        if isinstance(actor.answer, Exception):
            raise actor.answer
        return actor.answer

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", get)


@pytest.mark.usefixtures("_without_cluster")
def test_a_lost_replica_is_left_out_and_the_last_one_ends_the_service(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ray.exceptions import RayActorError

    actors = {f"http://{name}": _Actor() for name in "abc"}
    released: list[str] = []
    those = replicas.Replicas(actors, released.append)
    those.leave_lost_out()
    actors["http://a"].answer = RayActorError()
    actors["http://b"].answer = "silent"
    for _ in range(2):
        those.leave_lost_out()
    assert list(those.actors) == ["http://b", "http://c"] and released == ["http://a"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "http://b does not answer" in said[0]
    assert "http://a is lost for good: its actor is lost (RayActorError" in said[1] and "2 left" in said[1]
    actors["http://b"].answer = 75
    those.leave_lost_out()
    assert "http://b is lost for good: it ended with status 75" in capsys.readouterr().err
    actors["http://c"].answer = RayActorError()
    with pytest.raises(replicas.NoReplicaLeft, match="http://c"):
        those.leave_lost_out()


@pytest.mark.usefixtures("_without_cluster")
def test_while_they_start_all_are_needed() -> None:
    those = replicas.Replicas({"http://a": _Actor(), "http://b": _Actor(3)})
    with pytest.raises(replicas.ReplicaError, match=r"http://b .*status 3"):
        those.require_all()


def test_fronts_get_key_and_identity_outside_their_command_line() -> None:
    environment = replicas.front_environment({"version": "1"}, "secret")
    assert environment[front.API_KEY] == "secret" and environment[front.EXPECTED] == '{"version": "1"}'
    assert front.API_KEY not in replicas.front_environment({}, None)


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
