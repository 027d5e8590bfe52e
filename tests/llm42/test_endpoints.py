"""Which API key our endpoints ask for, under SGLang's own middleware."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sglang_ext.llm42.server import endpoints

GET, RESET = ("GET", "/llm42_stats"), ("POST", "/reset_llm42_stats")


class _TokenizerManager:
    async def get_internal_state(self) -> list[dict[str, Any]]:
        return []

    async def set_internal_state(self, request: object) -> list[bool]:
        return [True]


@pytest.mark.parametrize(
    ("api_key", "admin_key", "opened_by"),
    [
        (None, None, {GET: {None, "a", "b"}, RESET: {None, "a", "b"}}),
        ("a", None, {GET: {"a"}, RESET: {"a"}}),
        (None, "b", {GET: {None, "a", "b"}, RESET: {"b"}}),
        ("a", "b", {GET: {"a"}, RESET: {"b"}}),
    ],
)
def test_statistics_are_read_with_the_key_and_reset_with_the_admin_key(
    api_key: str | None,
    admin_key: str | None,
    opened_by: dict[tuple[str, str], set[str | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.entrypoints import http_server
    from sglang.srt.utils.auth import add_api_key_middleware

    app = FastAPI()
    monkeypatch.setattr(http_server, "app", app)
    monkeypatch.setattr(endpoints, "_tokenizer_manager", _TokenizerManager)
    endpoints.add_endpoints()
    if api_key or admin_key:
        add_api_key_middleware(app, api_key=api_key, admin_api_key=admin_key)
    client = TestClient(app)
    for (method, path), keys in opened_by.items():
        for key in (None, "a", "b"):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            status = client.request(method, path, headers=headers).status_code
            assert status == (200 if key in keys else 401), (method, path, key)
