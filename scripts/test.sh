#!/usr/bin/env bash
# Sets up the environment, runs ruff, import-linter and pytest. Arguments go to pytest: bash scripts/test.sh -k lsq
# Tests on photographs take them from LIFEQUANT_DATA, or from ../shared/data beside the clone. Without either they are
# skipped, and the summary says so.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
use_environment
cd "$top"

"$python" -m ruff check .
"$python" -m ruff format --check .
imports=$("$(dirname "$python")/lint-imports" --no-cache) || {
    echo "$imports"
    exit 1
}
# Two processes share the cores: threads that outnumber cores cost more than they bring.
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    workers=(-n 2)
fi
"$python" -m pytest -rs ${workers[@]+"${workers[@]}"} "$@"
