"""The command line, as torchrun starts it in tests; with ``--frozen`` first, BatchNorm keeps its statistics in training."""

import sys

from torch import nn

from lifequant.__main__ import main

if __name__ == "__main__":
    if "--frozen" in sys.argv:
        sys.argv.remove("--frozen")
        nn.BatchNorm2d.train = lambda self, mode=True: nn.Module.train(self, False)
    sys.exit(main())
