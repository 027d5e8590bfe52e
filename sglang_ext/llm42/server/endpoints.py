"""``GET /llm42_stats`` and ``POST /reset_llm42_stats`` on SGLang's HTTP server."""

from __future__ import annotations

from typing import Any

from sglang_ext.llm42.server.internal_state import RANK_KEY, RESET_KEY, STATE_KEY


def add_endpoints(*args: Any, **kwargs: Any) -> None:
    """Before ``_setup_and_run_http_server``: add our routes, under SGLang's handling of API keys."""
    from sglang.srt.entrypoints.http_server import app
    from sglang.srt.utils.auth import AuthLevel, auth_level

    # Not through a router: SGLang looks for the level among the app's own routes and takes what it does not
    # find there for an ordinary endpoint, which is open where only an admin key is set.
    app.get("/llm42_stats")(llm42_stats)
    app.post("/reset_llm42_stats")(auth_level(AuthLevel.ADMIN_OPTIONAL)(reset_llm42_stats))


async def llm42_stats() -> dict[str, dict[str, int]]:
    """Counters of every data-parallel rank since start or the last reset: ``{"dp_0": {...}, ...}``."""
    states = await _tokenizer_manager().get_internal_state()
    by_rank = sorted(states, key=lambda state: state[RANK_KEY])
    return {f"dp_{state[RANK_KEY]}": state[STATE_KEY] for state in by_rank}


async def reset_llm42_stats() -> dict[str, str]:
    """Set the counters of every data-parallel rank to zero."""
    from sglang.srt.managers.io_struct import SetInternalStateReq

    done = await _tokenizer_manager().set_internal_state(SetInternalStateReq(server_args={RESET_KEY: 1}))
    return {"status": "ok" if all(done) else "failed"}


def _tokenizer_manager() -> Any:
    from sglang.srt.entrypoints.http_server import get_global_state

    return get_global_state().tokenizer_manager
