"""The HTTP calls that a replay makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import requests

from sglang_ext.llm42.server.internal_state import CONFIGURATION_KEY
from sglang_ext.replay.comparison import Answer

#: Seconds to wait for the server's description.
INFO_TIMEOUT_S = 30.0


class ReplayError(RuntimeError):
    """The server cannot be asked, or does not answer as expected; the message says why."""


@dataclass(frozen=True)
class ServerInfo:
    """What a server says about itself.

    Attributes:
        tokenizer: name or folder of its tokenizer, None if unknown.
        weight_version: version of its weights, None if unknown.
        configurations: digests of the configuration of its data-parallel ranks.
    """

    tokenizer: str | None
    weight_version: str | None
    configurations: frozenset[str]


class Client:
    """One server; may be used in several threads.

    Args:
        url: where the server listens, for example ``http://127.0.0.1:30000``.
        api_key: the server's ``--api-key``, None if it has none.
        timeout_s: seconds that a request may take.
    """

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 3600.0) -> None:
        self._url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_s = timeout_s

    def info(self) -> ServerInfo:
        """What the server says about itself.

        Raises:
            ReplayError: it does not answer.
        """
        model = self._call("GET", "/model_info", INFO_TIMEOUT_S)
        states = self._call("GET", "/server_info", INFO_TIMEOUT_S).get("internal_states") or []
        digests = [state.get(CONFIGURATION_KEY) for state in states]
        return ServerInfo(
            model.get("tokenizer_path"), model.get("weight_version"), frozenset(d for d in digests if d)
        )

    def generate(self, body: Mapping[str, Any]) -> Answer:
        """Run one request.

        Raises:
            ReplayError: it is refused, the server does not answer, or does not say how it ended.
        """
        answer = self._call("POST", "/generate", self._timeout_s, body)
        try:
            return Answer.of(answer)
        except (KeyError, TypeError) as error:
            raise ReplayError(f"POST /generate: the answer lacks {error}") from error

    def _call(
        self, method: str, path: str, timeout_s: float, body: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        try:
            response = requests.request(
                method, self._url + path, json=body, headers=self._headers, timeout=timeout_s
            )
            if response.status_code != requests.codes.ok:
                raise ReplayError(f"{method} {path}: {response.status_code} {response.text[:300]}")
            answer = response.json()
        except requests.RequestException as error:
            raise ReplayError(f"{method} {self._url}{path}: {error}") from error
        if not isinstance(answer, dict):
            raise ReplayError(f"{method} {path}: the answer is no JSON object")
        return answer
