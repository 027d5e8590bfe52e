"""A second SGLang plugin, for tests only: counts where a step of ours makes the host wait for the device.

Loaded where this folder is on ``PYTHONPATH``. torch's sync debug mode is on while our code runs, off while
SGLang's own does. The file named by ``SYNC_WATCH_FILE`` holds the totals as JSON, written anew every few
steps. ``SYNC_WATCH_STEP_COST`` is what a canonical decode step costs, in verified tokens.
"""

from __future__ import annotations

import json
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

EVERY = 20


class Totals:
    """What was seen so far."""

    def __init__(self) -> None:
        self.quiet_steps = 0  # no verification was consumed
        self.quiet_waits = 0
        self.consuming_steps = 0
        self.passes = 0
        self.where: list[str] = []
        self.consumed = False
        self.waits = 0

    def step_done(self) -> None:
        if self.consumed:
            self.consuming_steps += 1
        else:
            self.quiet_steps += 1
            self.quiet_waits += self.waits
        self.consumed, self.waits = False, 0
        if (self.quiet_steps + self.consuming_steps) % EVERY == 0:
            shown = {name: value for name, value in vars(self).items() if name not in ("consumed", "waits")}
            Path(os.environ["SYNC_WATCH_FILE"]).write_text(json.dumps(shown))


TOTALS = Totals()


@contextmanager
def _mode(name: str) -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(name)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@contextmanager
def _watching() -> Iterator[None]:
    shown = warnings.showwarning

    def count(message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA operation" not in str(message):
            shown(message, *args, **kwargs)
            return
        TOTALS.waits += 1
        if not TOTALS.consumed and len(TOTALS.where) < 10:
            TOTALS.where.append("".join(traceback.format_stack(limit=8)))

    with _mode("warn"), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = count
        yield


def _watch(owner: Any, name: str, theirs: int | None = None) -> None:
    """Count inside of a function of ours; argument number ``theirs`` calls SGLang and counts not."""
    original = getattr(owner, name)

    def unwatched(call: Callable[[], Any]) -> Callable[[], Any]:
        def wrapped() -> Any:
            with _mode("default"):
                return call()

        return wrapped

    def watched(*args: Any, **kwargs: Any) -> Any:
        if theirs is not None:
            args = (*args[:theirs], unwatched(args[theirs]), *args[theirs + 1 :])
        with _watching():
            return original(*args, **kwargs)

    setattr(owner, name, watched)


def register() -> None:
    """Watch our parts of a step."""
    from sglang_ext.llm42 import allocation, decode_policy, drafting, runtime, verification

    decode_policy.STEP_COST = float(os.environ["SYNC_WATCH_STEP_COST"])
    engine, passes = runtime.Runtime, verification.Verification
    apply, run_step = passes._apply, engine.run_step

    def consuming(self: Any, launched: Any) -> None:
        TOTALS.consumed = True
        apply(self, launched)

    passes._apply = consuming  # type: ignore[method-assign]
    _watch(engine, "begin_step")
    _watch(drafting.Drafting, "sample", theirs=2)
    _watch(allocation, "prepare_for_decode")

    def step(self: Any, decode_step: Any, batch: Any, decode: Callable[[], Any]) -> Any:
        before = self.statistics.verify_forward_passes

        def unwatched() -> Any:
            with _mode("default"):
                return decode()

        with _watching():
            result = run_step(self, decode_step, batch, unwatched)
        TOTALS.passes += self.statistics.verify_forward_passes - before
        TOTALS.step_done()
        return result

    engine.run_step = step  # type: ignore[method-assign]
