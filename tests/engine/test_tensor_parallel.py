"""Two tensor-parallel ranks over gloo: both must take the same decisions, or the server hangs."""

from __future__ import annotations

from pathlib import Path

from determinism import ALONE_WARM, CROWD_OF_8, CROWD_OF_17, mismatches, run_alone
from live_server import Request, StartServer
from workloads import ONE_THREAD, marked, random_prompts


def test_same_output_on_two_ranks(start_server: StartServer, random_llama: Path) -> None:
    server = start_server(random_llama, "--tp-size", "2", "--max-total-tokens", "2048", **ONE_THREAD)
    prompts = random_prompts(8, 10, 80, seed=6)
    subjects = [
        *marked(prompts[:5], max_new_tokens=40, temperature=1.0, top_p=0.95),
        *marked(prompts[5:], max_new_tokens=40, temperature=0.0),
    ]
    neighbours = [
        Request(prompt, False, {"max_new_tokens": 30, "temperature": 0.9, "top_k": 30})
        for prompt in random_prompts(9, 10, 80, seed=7)
    ]
    alone = run_alone(server, subjects)
    assert len({output.token_ids for output in alone}) == len(subjects)
    for condition in (CROWD_OF_17, CROWD_OF_8, ALONE_WARM):
        assert not mismatches(server, subjects, alone, condition, neighbours)
    assert server.statistics()["verify_total_tokens"] > 0
