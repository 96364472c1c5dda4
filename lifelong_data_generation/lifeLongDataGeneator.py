"""Write the task CSVs of a folder of images (see lifequant/generate.py, or --help)."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("lifequant") is None:  # a bare clone that was not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lifequant.cli import run_main
from lifequant.generate import main_tasks

if __name__ == "__main__":
    sys.exit(run_main(main_tasks))
