"""Find settings on held-out training images, as ``lifequant search`` does (see --help)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

from lifequant.common.arguments import run_main
from lifequant.experiments.search import main

if __name__ == "__main__":
    sys.exit(run_main(main))
