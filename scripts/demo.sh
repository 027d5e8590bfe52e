#!/usr/bin/env bash
# The main job: environment, demo model, server, then the same prompts stock and deterministic under changing
# load. Arguments go to scripts/demo.py (see scripts/demo.sh --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/environment.sh

say "Demo model (SmolLM2-135M-Instruct)"
"$VENV/bin/python" -m sglang_ext.demo_model >/dev/null
exec "$VENV/bin/python" scripts/demo.py "$@"
