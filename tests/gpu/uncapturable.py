"""A canonical pass that waits for the device, so that no CUDA graph can hold it: ``uncapturable.py MODEL``.

Prints what the capture says and leaves with status 3 if it fails as it should.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from model_runner import small_runner


def main(model: Path) -> int:
    """Capture it."""
    from sglang_ext.llm42.attention import canonical_attention_factory
    from sglang_ext.llm42.canonical_graph import CaptureError, canonical_passes_for
    from sglang_ext.llm42.lane import LaneConfig

    with small_runner(model) as runner:

        def waiting_attention(*args: Any) -> Any:
            backend: Any = canonical_attention_factory(runner)(*args)
            forward = backend.forward_extend

            def forward_extend(q: torch.Tensor, *rest: Any, **kwargs: Any) -> torch.Tensor:
                q.sum().item()
                return forward(q, *rest, **kwargs)

            backend.forward_extend = forward_extend
            return backend

        try:
            canonical_passes_for(runner, LaneConfig(16, 2), waiting_attention)
        except CaptureError as error:
            print(error)
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
