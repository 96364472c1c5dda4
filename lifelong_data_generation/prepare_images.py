"""Write CIFAR, digits, Office-31 and others as train/<class>/0001.png and test/<class>/0001.png (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

from lifequant.common.arguments import run_main
from lifequant.data.create.images import main_prepare

if __name__ == "__main__":
    sys.exit(run_main(main_prepare))
