"""Choice of the path, and agreement of the ranks on it."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path as File

import pytest
import torch
import torch.distributed as dist

from sglang_ext.tokenweave.paths import Capabilities, Choice, Path, PathError, agree, choose, probe

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
    capabilities = probe(2, torch.device("cpu"), 1024, torch.bfloat16, one_node=True)
    assert choose("auto", capabilities).path is Path.COLLECTIVE


def _agree(rank: int, store: str, paths: tuple[Path, Path], messages: multiprocessing.Queue[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    group = dist.group.WORLD
    assert group is not None
    try:
        agree(Choice(paths[rank], f"reason {rank}"), group)
        messages.put("agreed")
    except PathError as error:
        messages.put(str(error))
    dist.destroy_process_group()


@pytest.mark.parametrize("paths", [(Path.PEER, Path.PEER), (Path.PEER, Path.COLLECTIVE)])
def test_ranks_must_choose_alike(paths: tuple[Path, Path], tmp_path: File) -> None:
    context = multiprocessing.get_context("fork")
    messages: multiprocessing.Queue[str] = context.Queue()  # type: ignore[assignment]
    arguments = (str(tmp_path / "store"), paths, messages)
    ranks = [context.Process(target=_agree, args=(rank, *arguments)) for rank in range(2)]
    for process in ranks:
        process.start()
    answers = {messages.get(timeout=60) for _ in ranks}
    for process in ranks:
        process.join(timeout=60)
    if paths[0] is paths[1]:
        assert answers == {"agreed"}
        return
    (message,) = answers
    assert "rank 0: peer (reason 0), rank 1: collective (reason 1)" in message
