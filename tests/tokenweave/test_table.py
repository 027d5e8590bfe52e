"""Stored tuning tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sglang_ext.tokenweave import split, table

SHAPE = split.dense_layer(4096, 14336, 32, 8, 128, world=2)
TABLE = table.Table(
    shape=table.shape_key(SHAPE, "bfloat16"),
    gpu="NVIDIA H100 80GB HBM3",
    tokens=(128, 256),
    attention=(10.0, 20.0),
    mlp=(30.0, 60.0),
    sm_tax=1.5,
    comm=split.CommModel(5.0, 1e5),
    made_with={"torch": "2.11.0"},
)


def test_round_trip(tmp_path: Path) -> None:
    path = table.save(TABLE, tmp_path)
    assert path.name == f"NVIDIA-H100-80GB-HBM3-{TABLE.shape}.json"
    assert table.load(tmp_path, TABLE.shape, TABLE.gpu) == TABLE
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_file_there_is_no_table(tmp_path: Path) -> None:
    assert table.load(tmp_path, TABLE.shape, TABLE.gpu) is None


def test_the_key_depends_on_shard_and_dtype() -> None:
    keys = {
        table.shape_key(split.dense_layer(4096, 14336, 32, 8, 128, world=world), dtype)
        for world in (1, 2, 4)
        for dtype in ("bfloat16", "float16")
    }
    assert len(keys) == 6


def test_tax_applies_beside_the_kernel_only() -> None:
    assert TABLE.alone().mlp_us(256) == 60.0
    assert TABLE.beside().mlp_us(256) == 90.0


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1, "shape": "x"}', '{"format": 99}'])
def test_damaged_files_are_named(tmp_path: Path, text: str) -> None:
    path = table.table_path(tmp_path, TABLE.shape, TABLE.gpu)
    path.write_text(text)
    with pytest.raises(table.TableError, match=path.name):
        table.load(tmp_path, TABLE.shape, TABLE.gpu)


def test_a_table_of_another_gpu_is_refused(tmp_path: Path) -> None:
    table.save(replace(TABLE, gpu="NVIDIA-H100-80GB HBM3"), tmp_path)
    with pytest.raises(table.TableError, match="is for shape"):
        table.load(tmp_path, TABLE.shape, TABLE.gpu)
