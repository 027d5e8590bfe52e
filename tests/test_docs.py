"""What the documentation says of the code: tests that it names are there, and modules are named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

#: `test_file.py::test_name`, with a folder in front or without one, where engine tests are meant;
#: `::test_name` stands for another test of the file before it.
_TEST = re.compile(r"`((?:[\w/]+\.py)?)::(test_\w+)")


def _named_tests() -> list[tuple[Path, str]]:
    """All tests that the table of the original's defects names."""
    found = []
    file = ""
    for name, test in _TEST.findall((ROOT / "docs/llm42.md").read_text()):
        file = name or file
        found.append((ROOT / (file if "/" in file else f"tests/engine/{file}"), test))
    return found


def test_tests_are_named() -> None:
    assert len(_named_tests()) > 15


@pytest.mark.parametrize(("path", "test"), _named_tests(), ids=lambda value: getattr(value, "name", value))
def test_a_named_test_exists(path: Path, test: str) -> None:
    assert re.search(rf"^def {test}\(", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("folder", ["sglang_ext/llm42", "sglang_ext/doctor"])
def test_the_structure_names_every_module(folder: str) -> None:
    text = (ROOT / "docs/structure.md").read_text()
    modules = {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}
    assert modules
    assert not [module for module in sorted(modules) if f"`{module}`" not in text]
