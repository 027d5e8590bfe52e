"""The stored measurements of one layer shape on one GPU: JSON, one file per (shape, GPU)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sglang_ext.tokenweave.split import CommModel, LayerShape, MeasuredModel

FORMAT = 1


class TableError(ValueError):
    """A table file is damaged or was made for something else; the message names the file."""


@dataclass(frozen=True)
class Table:
    """Measured times of one rank's share of a layer.

    Attributes:
        shape: digest of the layer's shard (:func:`shape_key`), which fixes the tensor-parallel size too.
        gpu: name of the GPU.
        tokens: ascending token counts.
        attention: microseconds of the attention block's matrix products at each count, GPU to itself.
        mlp: likewise for the MLP block.
        sm_tax: by how much compute grows beside the resident fused kernel (1.0 = not at all).
        comm: the fused kernel's time model; None where it could not be measured (one GPU).
        made_with: versions of torch and CUDA.
    """

    shape: str
    gpu: str
    tokens: tuple[int, ...]
    attention: tuple[float, ...]
    mlp: tuple[float, ...]
    sm_tax: float = 1.0
    comm: CommModel | None = None
    made_with: dict[str, str] = field(default_factory=dict)

    def alone(self) -> MeasuredModel:
        """Compute times with the GPU to itself."""
        return MeasuredModel(self.tokens, self.attention, self.mlp)

    def beside(self) -> MeasuredModel:
        """Compute times while the fused kernel is resident."""

        def tax(times: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(time * self.sm_tax for time in times)

        return MeasuredModel(self.tokens, tax(self.attention), tax(self.mlp))


def shape_key(shape: LayerShape, dtype: str) -> str:
    """Short digest of the layer shard's products and dtype."""
    products = [(gemm.name, gemm.n, gemm.k) for gemm in (*shape.attention, *shape.mlp)]
    return hashlib.sha256(json.dumps([products, shape.hidden, dtype]).encode()).hexdigest()[:16]


def default_folder() -> Path:
    """Where tables are kept: ``$XDG_CACHE_HOME/sglang_ext/tokenweave``, by default under ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sglang_ext" / "tokenweave"


def table_path(folder: Path, shape: str, gpu: str) -> Path:
    """File of the table for a shape digest and a GPU name."""
    return folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', gpu)}-{shape}.json"


def save(table: Table, folder: Path) -> Path:
    """Write ``table`` into ``folder``, in one step, and return the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = table_path(folder, table.shape, table.gpu)
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"format": FORMAT, **asdict(table)}, indent=1), encoding="utf-8")
    part.replace(path)
    return path


def load(folder: Path, shape: str, gpu: str) -> Table | None:
    """The table for a shape digest and a GPU name, or None if there is none.

    Raises:
        TableError: the file is damaged, or its content is for another shape or GPU.
    """
    path = table_path(folder, shape, gpu)
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("format") != FORMAT:
            raise TableError(f"{path} has another format; run the tuning program again")
        comm = content.pop("comm")
        for name in ("tokens", "attention", "mlp"):
            content[name] = tuple(content[name])
        table = Table(**content, comm=CommModel(**comm) if comm else None)
        table.alone()
    except (KeyError, TypeError, ValueError) as error:
        raise TableError(f"{path} is not a TokenWeave table: {error}") from error
    if (table.shape, table.gpu) != (shape, gpu):
        raise TableError(f"{path} is for shape {table.shape} on {table.gpu}, not {shape} on {gpu}")
    return table
