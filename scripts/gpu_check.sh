#!/usr/bin/env bash
# Checks LifeQuant on a CUDA GPU in at most ten minutes and writes a report with a verdict a line.
# Usage: bash scripts/gpu_check.sh [--minutes 10] [--out gpu_check.md] [--device cpu]
# With --device cpu it goes through the same checks in small, to try them out without a GPU.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_common.sh"
use_environment
exec "$python" "$top/scripts/gpu_check.py" "$@"
