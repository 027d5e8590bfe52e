"""What the documentation says of the code: tests, modules, files and flags that it names are there."""

from __future__ import annotations

import argparse
import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang_ext import hooks

ROOT = Path(__file__).parents[1]

#: `test_file.py::test_name`, with a folder in front or without one, where engine tests are meant;
#: `::test_name` stands for another test of the file before it.
_TEST = re.compile(r"`((?:[\w/]+\.py)?)::(test_\w+)")

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_CODE_BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

#: Files of the repository.
_FILE = re.compile(
    r"(?<![\w/.:])((?:tests|scripts|docs|sglang_ext|cuda)/[\w/.-]+\.(?:py|sh|md|csv|png|yaml|cuh?|h))\b"
)

#: Flags of ours by their beginnings: all of these in the documentation must exist.
_OUR_FLAG = re.compile(r"--(?:no-)?(?:llm42|tokenweave|ray)-[a-z0-9]+(?:-[a-z0-9]+)*")

#: Folders of one machine or one run.
_LOCAL_PATH = re.compile(r"(?<![\w.])/(?:tmp|work|root|home|mnt|workspace)/\w")


def _pages() -> list[Path]:
    """Everything in Markdown that a reader may come across."""
    return [
        *(ROOT / name for name in ("README.md", "CHANGELOG.md", "cuda/README.md")),
        *sorted((ROOT / "docs").rglob("*.md")),
    ]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# Tests that are named


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


# Modules and scripts


def _named_in_structure() -> Counter[str]:
    """Files in the first cells of the tables of docs/structure.md, as paths from the repository's root."""
    named: Counter[str] = Counter()
    folder = ""
    for line in (ROOT / "docs/structure.md").read_text().splitlines():
        if line.startswith("## "):
            match = re.match(r"## `([\w/]+/)`", line)
            folder = match[1] if match else ""
        elif line.startswith("| `"):
            named.update(
                folder + name for name in re.findall(r"`([\w/.]+\.(?:py|sh))`", line.split(" | ")[0])
            )
    return named


def _modules() -> set[str]:
    """Modules of the package, without ``__init__.py`` files that hold no code."""
    modules = {_name(path) for path in (ROOT / "sglang_ext").rglob("*.py")}
    return {name for name in modules if not name.endswith("__init__.py")} | {
        "sglang_ext/demo_model/__init__.py"
    }


def test_the_structure_names_every_module_once() -> None:
    named, modules = _named_in_structure(), _modules()
    assert len(modules) > 100
    assert not sorted(modules - set(named)), "not named"
    assert not sorted(name for name in named if named[name] > 1), "named twice"


def test_the_structure_names_every_script_once() -> None:
    scripts = {_name(path) for path in (ROOT / "scripts").iterdir() if path.suffix in (".py", ".sh")}
    assert scripts and not sorted(scripts - set(_named_in_structure()))


def test_what_the_structure_names_exists() -> None:
    assert not [name for name in _named_in_structure() if not (ROOT / name).is_file()]


def test_every_module_of_tests_has_a_name_of_its_own() -> None:
    """pytest imports them by their bare names, and ends before the first test where two are the same."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, times in names.items() if times > 1] == []


# Links


def _links() -> Iterator[tuple[Path, str]]:
    for page in _pages():
        for target in _LINK.findall(_CODE_BLOCK.sub("", page.read_text())):
            if "://" not in target and not target.startswith("mailto:"):
                yield page, target


def _anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = _HEADING.findall(_CODE_BLOCK.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_somewhere() -> None:
    links = list(_links())
    assert len(links) > 50
    broken = []
    for page, target in links:
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in _anchors(file)):
            broken.append(f"{_name(page)}: {target}")
    assert not broken


def test_the_readme_leads_to_every_page() -> None:
    linked = {(page.parent / target.partition("#")[0]).resolve() for page, target in _links()}
    assert not [_name(page) for page in (ROOT / "docs").glob("*.md") if page not in linked]
    of_readme = {target for page, target in _links() if page.name == "README.md"}
    assert not [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in of_readme]


def test_files_that_are_named_exist() -> None:
    named = {(page, name) for page in _pages() for name in _FILE.findall(page.read_text())}
    assert len(named) > 50
    assert not sorted(f"{_name(page)}: {name}" for page, name in named if not (ROOT / name).exists())


# Flags


@functools.cache
def _flags() -> frozenset[str]:
    """Flags of ours, as the parser has them."""
    hooks.install(hooks.Feature.FLAGS)
    from sglang_ext.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    groups = [group for group in parser._action_groups if "(sglang_ext)" in (group.title or "")]
    actions = [action for group in groups for action in group._group_actions]
    return frozenset(flag for action in actions for flag in action.option_strings)


def _flags_in(text: str) -> set[str]:
    return {flag for flag in _flags() if re.search(rf"(?<![\w-]){flag}(?![\w-])", text)}


@pytest.mark.parametrize(
    ("page", "beginning"),
    [
        ("README.md", "--llm42-"),
        ("README.md", "--enable-"),
        ("docs/tokenweave.md", "--tokenweave-"),
        ("docs/ray.md", "--ray-"),
    ],
)
def test_every_flag_is_documented(page: str, beginning: str) -> None:
    flags = {flag for flag in _flags() if flag.startswith(beginning)}
    assert flags
    assert not sorted(flags - _flags_in((ROOT / page).read_text()))


def test_every_flag_is_somewhere() -> None:
    text = "\n".join(page.read_text() for page in _pages())
    assert not sorted(flag for flag in _flags() - _flags_in(text) if not flag.startswith("--no-"))


@pytest.mark.parametrize("page", _pages(), ids=_name)
def test_flags_in_the_documentation_exist(page: Path) -> None:
    assert not sorted(set(_OUR_FLAG.findall(page.read_text())) - _flags())


# Messages


@functools.cache
def _messages() -> str:
    """All strings of the code, what is filled into them left out, and the shell scripts."""
    found = []
    for path in [*(ROOT / "sglang_ext").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-+.\d]*[a-z]", "\0", node.value))
    found += [path.read_text() for path in (ROOT / "scripts").glob("*.sh")]
    return "\0".join(found)


def _quoted() -> list[str]:
    """Messages in the first column of docs/troubleshooting.md: code with spaces in it."""
    rows = [
        line for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines() if line.startswith("| ")
    ]
    quoted = [code for row in rows for code in re.findall(r"`([^`]+)`", row.split(" | ")[0])]
    return [code for code in quoted if " " in code]


@pytest.mark.parametrize("message", _quoted())
def test_a_message_that_is_explained_exists(message: str) -> None:
    pieces = [piece for piece in message.split("...") if re.search(r"\w", piece)]
    assert pieces
    assert not [piece for piece in pieces if piece not in _messages()]


def test_messages_are_explained() -> None:
    assert len(_quoted()) > 30


# Machines


def _texts() -> list[Path]:
    """All pages, and what else of the documentation is text."""
    suffixes = (".csv", ".json", ".jsonl", ".yaml")
    return [*_pages(), *(path for path in sorted((ROOT / "docs").rglob("*")) if path.suffix in suffixes)]


@pytest.mark.parametrize("file", _texts(), ids=_name)
def test_no_folder_of_one_machine_is_named(file: Path) -> None:
    assert not _LOCAL_PATH.findall(file.read_text())


def test_a_folder_of_one_machine_is_recognised() -> None:
    assert _LOCAL_PATH.search("results in /tmp/run-7/state") and _LOCAL_PATH.search("`/home/x`")
    assert not _LOCAL_PATH.search("`ipc://` files in `/tmp`, tests/home/x, https://host/tmp/x")
