"""Choice of the path, and agreement of the ranks on it."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path as File
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sglang_ext.tokenweave.paths import (
    Capabilities,
    Choice,
    Path,
    PathError,
    agree,
    agree_on_cuts,
    choose,
    peer_problem,
    probe,
)

HOPPER = Capabilities(world=8, device="cuda", capability=(9, 0))


def test_fastest_path_first() -> None:
    assert choose("auto", HOPPER).path is Path.MULTICAST


@pytest.mark.parametrize(
    ("change", "path", "reason"),
    [
        ({"multicast_problem": "switched off"}, Path.PEER, "no multicast: switched off"),
        ({"capability": (8, 0)}, Path.PEER, "no multicast: multicast needs compute capability 9.0"),
        ({"kernel_problem": "no nvcc"}, Path.COLLECTIVE, "no multicast: no nvcc; no peer: no nvcc"),
        ({"peer_problem": "two nodes"}, Path.COLLECTIVE, "no peer: two nodes"),
        ({"shape_problem": "odd rows"}, Path.COLLECTIVE, "no peer: odd rows"),
        ({"device": "cpu"}, Path.COLLECTIVE, "there is no CUDA GPU"),
    ],
)
def test_degrades_and_says_why(change: dict[str, object], path: Path, reason: str) -> None:
    choice = choose("auto", replace(HOPPER, **change))  # type: ignore[arg-type]
    assert choice.path is path
    assert reason in choice.reason


def test_a_path_asked_for_is_used_or_refused() -> None:
    assert choose("peer", HOPPER).path is Path.PEER
    assert choose("collective", HOPPER).path is Path.COLLECTIVE
    with pytest.raises(PathError, match="--tokenweave-path multicast cannot be used: switched off"):
        choose("multicast", replace(HOPPER, multicast_problem="switched off"))


def test_probe_of_a_cpu() -> None:
    capabilities = probe(2, torch.device("cpu"), 1024, torch.bfloat16, None)
    assert choose("auto", capabilities).path is Path.COLLECTIVE


def _agree(rank: int, store: str, choices: tuple[Any, Any], messages: multiprocessing.Queue[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    try:
        if isinstance(choices[rank], torch.device):
            messages.put(str(peer_problem(choices[rank], group)))
            return
        if isinstance(choices[rank], Path):
            agree(Choice(choices[rank], f"reason {rank}"), group)
        else:
            agree_on_cuts(choices[rank], group)
        messages.put("agreed")
    except PathError as error:
        messages.put(str(error))
    dist.destroy_process_group()


def _answers(choices: tuple[Any, Any], folder: File) -> set[str]:
    """What both ranks say to their choices."""
    context = multiprocessing.get_context("fork")
    messages: multiprocessing.Queue[str] = context.Queue()  # type: ignore[assignment]
    arguments = (str(folder / "store"), choices, messages)
    ranks = [context.Process(target=_agree, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    answers = {messages.get(timeout=60) for _ in ranks}
    for process in ranks:
        process.join(timeout=60)
    return answers


@pytest.mark.parametrize("choices", [(Path.PEER, Path.PEER), ([None, 512], [None, 512])])
def test_ranks_that_choose_alike_agree(choices: tuple[Any, Any], tmp_path: File) -> None:
    assert _answers(choices, tmp_path) == {"agreed"}


def test_ranks_must_choose_the_same_path(tmp_path: File) -> None:
    (message,) = _answers((Path.PEER, Path.COLLECTIVE), tmp_path)
    assert "rank 0: peer (reason 0), rank 1: collective (reason 1)" in message


def test_ranks_must_cut_alike(tmp_path: File) -> None:
    """As with a tuning table that only one of two nodes has."""
    (message,) = _answers(([None, 512], [None, 640]), tmp_path)
    assert "otherwise on ranks [1] than on rank 0" in message and "--tokenweave-table" in message


@pytest.mark.parametrize(
    ("reachable", "answer"),
    [
        ({(0, 1), (1, 0)}, "None"),
        # One direction alone would let the ranks choose differently: all must hear of it.
        ({(0, 1)}, "GPU 0 of rank 0 is out of reach of rank 1"),
    ],
)
def test_gpus_that_cannot_reach_each_other_are_no_peers(
    reachable: set[tuple[int, int]], answer: str, tmp_path: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    def can_access(device: torch.device, peer: torch.device) -> bool:
        return (device.index, peer.index) in reachable

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(uuid=f"GPU-{getattr(device, 'index', device)}"),
    )
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", can_access)
    devices = (torch.device("cuda", 0), torch.device("cuda", 1))
    assert _answers(devices, tmp_path) == {answer}
