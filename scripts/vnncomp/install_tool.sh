#!/bin/bash
# VNN-COMP: install_tool.sh v1
# Installs this checkout into a virtual environment of its own, once for a machine.
#   CERTTRAIN_ENVIRONMENT   where (default: .venv-vnncomp in the checkout)
#   CERTTRAIN_PYTHON        Python 3.11 or later to make it with (default: the first one found)
set -euo pipefail

if [ "${1:-}" != v1 ]; then
    echo "error: found version '${1:-}'; accepted: install_tool.sh v1" >&2
    exit 1
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
environment=${CERTTRAIN_ENVIRONMENT:-$root/.venv-vnncomp}

fits() {
    command -v "$1" >/dev/null && "$1" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}
if [ ! -x "$environment/bin/python" ]; then
    python=
    for one in ${CERTTRAIN_PYTHON:-python3.13 python3.12 python3.11 python3}; do
        if fits "$one"; then
            python=$one
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "error: found no Python with its module venv; accepted: 3.11 or later, as CERTTRAIN_PYTHON" >&2
        exit 1
    fi
    "$python" -m venv "$environment"
fi
"$environment/bin/python" -m pip install --disable-pip-version-check "$root"
"$environment/bin/certtrain" --name
"$environment/bin/certtrain" --version
