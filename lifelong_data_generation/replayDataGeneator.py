"""Write the replay CSVs (see lifequant/data/create/replay.py, or --help). Also as replayDataGenerator.py."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

from lifequant.common.arguments import run_main
from lifequant.data.create.replay import main_replay

if __name__ == "__main__":
    sys.exit(run_main(main_replay))
