"""replayDataGeneator.py under the spelling that the original README used."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).with_name("replayDataGeneator.py")), run_name="__main__")
