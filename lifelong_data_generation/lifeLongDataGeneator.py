"""Write the task CSVs of a folder of images (see lifequant/data/create/tasks.py, or --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

from lifequant.common.arguments import run_main
from lifequant.data.create.tasks import main_tasks

if __name__ == "__main__":
    sys.exit(run_main(main_tasks))
