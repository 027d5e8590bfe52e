"""Fixtures that every layer of tests shares, and the rules that skip what this machine cannot run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from models import write_tiny_llama

from sglang_ext import demo_model

#: GPUs that a test of each marker needs.
GPUS_NEEDED = {"gpu": 1, "multigpu": 2}

#: Files with one of these in their names run one after the other.
ALONE = ("gpu", "engine/test_ray")

#: On the path of every Python that tests start; see the module in it.
QUICK_IMPORTS = str(Path(__file__).parent / "quick_imports")


def pytest_configure() -> None:
    """Let servers start faster, and each of several test processes compute with its share of the cores."""
    path = os.environ.get("PYTHONPATH", "")
    if QUICK_IMPORTS not in path.split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [QUICK_IMPORTS, path]))
    if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
        # Servers that compute with all cores at the same time wait for each other by spinning.
        threads = max(1, len(os.sched_getaffinity(0)) // int(workers))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file of tests stays in one process; so do all that start Ray, and all that use a GPU."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((alone for alone in ALONE if alone in file), file)

    return Scheduling(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run engines last, and skip tests marked gpu or multigpu where there are too few GPUs.

    An engine installs our hooks in this process for good, and tests of the parts want them absent.
    """
    items.sort(key=lambda item: item.get_closest_marker("engine") is not None)
    needing = [(item, need) for item in items if (need := _gpus_needed(item))]
    if not needing:
        return
    import torch

    present = torch.cuda.device_count()
    for item, need in needing:
        if present < need:
            item.add_marker(pytest.mark.skip(reason=f"needs {need} CUDA GPU(s), this machine has {present}"))


def _gpus_needed(item: pytest.Item) -> int:
    return max((need for marker, need in GPUS_NEEDED.items() if item.get_closest_marker(marker)), default=0)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the demo model, made in the user's cache on first use (about half a minute)."""
    return demo_model.build()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama without tokenizer: 2 layers, hidden size 64, vocabulary 512, good for TP=2."""
    return write_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))
