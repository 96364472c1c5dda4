"""Count each task's classes; write reweight_0.json, ... (training computes these weights itself, without the files)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

from lifequant.common.arguments import run_main
from lifequant.data.create.class_counts import main_counts

if __name__ == "__main__":
    sys.exit(run_main(main_counts))
