#!/usr/bin/env bash
# Every check there is: environment, lint, format, types, tests. Arguments go to pytest:
#
#   scripts/test.sh                      all tests that this machine can run
#   scripts/test.sh -m "not engine"      without those that start the SGLang engine
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
run pytest "$@"
