"""``lifequant``, ``python -m lifequant`` and resnet-20-cifar-10/main.py: one command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lifequant import signals
from lifequant.cli import run_main


def train(argv: Sequence[str]) -> int:
    """Parse, then train, test or list. Raises UserError."""
    from lifequant import options

    if "--list" in argv:
        from lifequant import registry

        print(registry.describe())
        return 0
    config, notes = options.parse(argv)
    try:
        with signals.handled():
            if config.test_only:
                from lifequant.test_only import test as job
            elif config.bit_schedule:
                from lifequant.ladder import run as job
            else:
                from lifequant.train import run as job
            job(config, notes)
    except signals.Stopped as stopped:
        code, text = signals.ending(stopped, bool(config.resume))
        print(f"lifequant: {text}", file=sys.stderr)
        return code
    return 0


def main() -> int:
    """Exit code of the command line."""
    return run_main(train)


if __name__ == "__main__":
    sys.exit(main())
