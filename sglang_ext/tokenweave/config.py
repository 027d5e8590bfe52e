"""What the flags say, as one frozen object."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_ext.tokenweave.kernel import DEFAULT_TIMEOUT_S, MAX_CTAS


@dataclass(frozen=True)
class TokenWeaveConfig:
    """Flags of TokenWeave; each field is the flag ``--tokenweave-<field>`` (``--enable-tokenweave``).

    Attributes:
        enabled: whether TokenWeave is asked for.
        split: "auto" (wave model or tuning table), "equal" halves, "never" (fused kernel only), or the
            number of tokens of the first half (for tests).
        canonical_split: how canonical passes of LLM-42 are cut: "equal" halves, or "never". Fixed at start,
            for it changes their bits; neither ``split`` nor ``min_tokens`` has a say.
        min_tokens: smallest batch that may be cut; None for 1,024, or 2,048 for a mixture of experts.
        ctas: thread blocks of the fused kernel beside compute.
        fused_ctas: thread blocks of the fused kernel where nothing runs beside it; None to measure at start
            which number is best, and where SGLang's own all-reduce and norm are faster.
        reserve: keep matrix products off the kernel's multiprocessors (see
            :mod:`sglang_ext.tokenweave.multiprocessors`).
        path: "auto", "multicast", "peer" or "collective" (see :mod:`sglang_ext.tokenweave.paths`).
        barrier_timeout: seconds after which a barrier of the kernel gives up.
        table: folder of tuning tables; None for the default one.
        poison_residual: fill residual rows that this rank does not own with NaN (for tests).
    """

    enabled: bool = False
    split: str = "auto"
    canonical_split: str = "equal"
    min_tokens: int | None = None
    ctas: int = 8
    fused_ctas: int | None = None
    reserve: bool = True
    path: str = "auto"
    barrier_timeout: float = DEFAULT_TIMEOUT_S
    table: Path | None = None
    poison_residual: bool = False

    def __post_init__(self) -> None:
        if self.split not in ("auto", "equal", "never") and not self.split.isdecimal():
            raise ValueError(f"--tokenweave-split must be auto, equal, never or a number, not {self.split!r}")
        if self.canonical_split not in ("equal", "never"):
            raise ValueError(
                f"--tokenweave-canonical-split must be equal or never, not {self.canonical_split!r}"
            )
        if self.path not in ("auto", "multicast", "peer", "collective"):
            raise ValueError(
                f"--tokenweave-path must be auto, multicast, peer or collective, not {self.path!r}"
            )
        if self.min_tokens is not None and self.min_tokens < 2:
            raise ValueError(f"--tokenweave-min-tokens must be at least 2, not {self.min_tokens}")
        for flag, ctas in (("ctas", self.ctas), ("fused-ctas", self.fused_ctas)):
            if ctas is not None and not 1 <= ctas <= MAX_CTAS:
                raise ValueError(f"--tokenweave-{flag} must be 1 to {MAX_CTAS}, not {ctas}")
        if self.barrier_timeout <= 0:
            raise ValueError("--tokenweave-barrier-timeout must be positive")

    @classmethod
    def from_server_args(cls, server_args: Any) -> TokenWeaveConfig:
        """Read the flags from SGLang's server arguments; a flag that is absent keeps its default.

        Raises:
            ValueError: naming the flag that is out of range.
        """
        fields = {name: f"tokenweave_{name}" for name in cls.__dataclass_fields__ if name != "enabled"}
        given = {
            name: getattr(server_args, flag) for name, flag in fields.items() if hasattr(server_args, flag)
        }
        if given.get("table") is not None:
            given["table"] = Path(given["table"])
        return cls(enabled=bool(getattr(server_args, "enable_tokenweave", False)), **given)
