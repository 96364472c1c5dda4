"""Count each task's classes; write reweight_0.json, ... (training computes these weights itself, without the files)."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("lifequant") is None:  # a bare clone that was not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lifequant.common.arguments import run_main
from lifequant.data.create.class_counts import main_counts

if __name__ == "__main__":
    sys.exit(run_main(main_counts))
