#!/usr/bin/env bash
# The environment, ruff and pytest. Arguments go to pytest: bash scripts/test.sh -k lsq
# Tests on real photographs take their images from LIFEQUANT_DATA, else from ../shared/data beside the clone; without
# either they are skipped, and the summary says so.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
use_environment
cd "$top"

"$python" -m ruff check .
"$python" -m ruff format --check .
"$(dirname "$python")/lint-imports" --no-cache >/dev/null || "$(dirname "$python")/lint-imports" --no-cache
# Two processes; the cores are shared out among them, for threads that outnumber cores cost more than they bring.
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > 2 ? cores / 2 : 1))}
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then
    workers=(-n 2)
fi
"$python" -m pytest -rs ${workers[@]+"${workers[@]}"} "$@"
