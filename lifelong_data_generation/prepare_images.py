"""Write train/<class>/0001.png and test/<class>/0001.png of CIFAR-10, CIFAR-100 or digits (see --help)."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("lifequant") is None:  # a bare clone that was not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lifequant.common.arguments import run_main
from lifequant.data.create.images import main_prepare

if __name__ == "__main__":
    sys.exit(run_main(main_prepare))
