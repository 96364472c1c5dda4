"""``lifequant``, ``python -m lifequant`` and resnet-20-cifar-10/main.py: one command line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from lifequant.common.arguments import run_main
from lifequant.common.errors import one_line
from lifequant.runtime import preemption


def train(argv: Sequence[str]) -> int:
    """Parse, then train, test or list. Raises UserError."""
    from lifequant import options

    if "--list" in argv:
        from lifequant import registry

        print(registry.describe())
        return 0
    config, notes = options.parse(argv)
    try:
        with preemption.handled():
            if config.test_only:
                from lifequant.evaluate_only import test as job
            elif config.bit_schedule:
                from lifequant.progressive_bits import run as job
            else:
                from lifequant.train import run as job
            job(config, notes)
    except preemption.Stopped as stopped:
        code, text = preemption.ending(stopped, bool(config.resume))
        print(f"lifequant: {text}", file=sys.stderr)
        return code
    return 0


def main() -> int:
    """Exit code of the command line; after a fault of our own 1, with its traceback and a line on what to do."""
    try:
        return run_main(train)
    except Exception:  # what is the user's to mend run_main has said
        traceback.print_exc()
        print(f"lifequant: {one_line(_what_to_do(sys.argv[1:]))}", file=sys.stderr)
        return 1


def _what_to_do(argv: Sequence[str]) -> str:
    """To report a fault, and where the run's state lies."""
    from lifequant import options
    from lifequant.checkpointing import checkpoint

    report = "this is a fault of LifeQuant's: please report it with the lines above"
    try:
        last = Path(options.parse(argv)[0].job_dir) / "checkpoint" / "last.pt"
        state, last = checkpoint.read_last(last, lambda _: None)
    except Exception:  # whatever it is, it must not hide the fault
        return f"{report}; there is no checkpoint to go on with"
    return f"{report}; the state at task {state['task_index']}, step {state['step']} is in {last}: --resume goes on with it"


if __name__ == "__main__":
    sys.exit(main())
