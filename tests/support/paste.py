"""Stand-ins for what pasted shell blocks call, so that a page of them runs in seconds.

``python paste.py TOP`` serves the commands of one bash. ``python``, ``python3`` and ``lifequant`` are small scripts that send
their words and folder through a named pipe. The server has imported torch once and forks for each command. What runs is
the real thing, from the copy of the project in TOP: its parsers, its files, its training, at 8 pixels and one epoch. Only
the download of CIFAR is replaced, by four images a class.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

TRAINING = ["--num_epochs", "1", "--image_size", "8", "--train_batch_size", "16", "--compile", "off", "--device", "cpu"]
CLASSES = 8
CLIENT = """#!/bin/bash
printf '%s\\0' "$PWD" "$(basename "$0")" "$@" >"{pipes}/request"
read -r code <"{pipes}/reply"
exit "$code"
"""
PIP = """#!/bin/bash
set -e
[ "$*" = "${*/-e ./}" ] || [ -f pyproject.toml ] || { echo "pip: no pyproject.toml in $PWD"; exit 1; }
cp "$(dirname "$0")/python" "$(dirname "$0")/lifequant"
case $* in *demo*) printf '#!/bin/bash\\n[ -d "$2" ]\\n' >"$(dirname "$0")/tensorboard"; chmod +x "$(dirname "$0")/tensorboard";; esac
"""


def make_commands(folder: Path) -> None:
    """python, python3 and pip in ``folder``; pip adds lifequant, and tensorboard with the extra that brings it."""
    folder.mkdir()
    for name, text in (("python", CLIENT), ("python3", CLIENT), ("pip", PIP)):
        (folder / name).write_text(text.replace("{pipes}", str(folder)))
        (folder / name).chmod(0o755)
    for name in ("request", "reply"):
        os.mkfifo(folder / name)


def call(name: str, words: list[str]) -> int:
    """Run ``python WORDS`` or ``lifequant WORDS`` in this process; its exit code."""
    from lifequant.__main__ import main

    if name == "lifequant":
        trains = words[:1] == ["train"] or words[0].startswith("--")
        return main([*words, *(TRAINING if trains else [])])
    if words[:2] == ["-m", "venv"]:
        (bin_ := Path(words[2], "bin")).mkdir(parents=True)
        (bin_ / "activate").write_text("")
        return 0
    sys.argv = [*words, *(TRAINING if words[0].endswith("main.py") else [])]
    runpy.run_path(words[0], run_name="__main__")
    return 0


def few_images(*_: Any) -> tuple:
    """In place of CIFAR's archive."""
    import numpy as np

    counts, noise = {"train": 4, "test": 2}, np.random.default_rng(0)
    labels = {side: np.repeat(np.arange(CLASSES), n) for side, n in counts.items()}
    images = {side: noise.integers(0, 256, (CLASSES * n, 32, 32, 3), dtype=np.uint8) for side, n in counts.items()}
    return "a stand-in", [f"class{i}" for i in range(CLASSES)], images, labels


def serve(pipes: Path) -> None:
    """Answer commands until one names nothing."""
    for name in ("torch._dynamo", "lifequant.progressive_bits"):  # the first is what an optimizer imports
        import_module(name)  # seconds that are spent once
    images = import_module("lifequant.data.create.images")
    images.read_cifar = few_images
    print("ready", flush=True)
    os.dup2(2, 1)  # what commands print goes to the log
    while True:
        folder, name, *words, _ = (pipes / "request").read_bytes().decode().split("\0")
        if not name:
            return
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.chdir(folder)
                print(f"$ {name} {' '.join(words)}", flush=True)
                code = call(name, words)
            except SystemExit as ended:
                code = ended.code or 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code if isinstance(code, int) else 1)
        (pipes / "reply").write_text(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
