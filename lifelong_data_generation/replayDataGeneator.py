"""Write the replay CSVs (see lifequant/data/create/replay.py, or --help). Also as replayDataGenerator.py."""

import sys
from importlib.util import find_spec
from pathlib import Path

if find_spec("lifequant") is None:  # a bare clone that was not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lifequant.common.arguments import run_main
from lifequant.data.create.replay import main_replay

if __name__ == "__main__":
    sys.exit(run_main(main_replay))
