#!/usr/bin/env bash
# Every check there is: environment, lint, format, types, tests. Arguments go to pytest:
#
#   scripts/test.sh                      all tests that this machine can run
#   scripts/test.sh -m "not engine"      without those that start the SGLang engine
#   scripts/test.sh -n 0 -k stress       in one process, with all cores (--pdb and -s need this)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/environment.sh

run() {
    say "$*"
    "$VENV/bin/python" -m "$@"
}

run ruff check .
run ruff format --check .
run mypy
# Two processes; --no-loadscope-reorder keeps the order of tests/conftest.py, engines last.
run pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
