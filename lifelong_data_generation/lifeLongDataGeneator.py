"""Write the task CSVs of a folder of images (see lifequant/data/create/tasks.py, or --help)."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("lifequant") is None:  # a bare clone that was not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lifequant.common.arguments import run_main
from lifequant.data.create.tasks import main_tasks

if __name__ == "__main__":
    sys.exit(run_main(main_tasks))
