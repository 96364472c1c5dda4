"""A quantized model in a loop of one's own, under two processes: as in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parent / "support" / "sharded.py"


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_as_one_process(kind):
    """All parameters have a gradient, and come to the values of one process; the whole state loads."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(WORKER), kind]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[0] == "moved" and words[1] == words[3]
