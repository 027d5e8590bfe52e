"""``python -m sglang_ext.demo_model``: make the demo model's folder and print its path."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sglang_ext.demo_model import FOLDER_VARIABLE, build, default_folder
from sglang_ext.demo_model.folder import FolderError


def main() -> int:
    """Exit status: 0 with the folder's path on standard output, 1 with one sentence on standard error."""
    parser = argparse.ArgumentParser(prog="python -m sglang_ext.demo_model", description=__doc__)
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder to make (default: ${FOLDER_VARIABLE}, else {default_folder()})",
    )
    try:
        print(build(parser.parse_args().output))
    except FolderError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
