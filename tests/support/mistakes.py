"""tests/support/mistakes.md: sessions of a terminal, run as they stand there. ``python tests/support/mistakes.py`` writes the answers anew.

A block is a new folder with images/ and the task CSVs csvs/ of two tasks. A line ``$ python <program> ...`` is run through that
program's own main, ``$ lifequant ...`` by the command line's, any other ``$`` line by a shell; below a program's line stands what it says on stderr, with <here> for
the folder of the block and <lifequant> for the clone.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # as pytest does

from lifequant.__main__ import command, train
from lifequant.common.arguments import run_main
from lifequant.common.files import TOP
from lifequant.data.create.images import main_prepare
from lifequant.data.create.replay import main_replay
from lifequant.data.create.tasks import main_tasks
from support.tiny import Tiny, write_csvs, write_images

PAGE = Path(__file__).with_name("mistakes.md")
PROGRAMS = {  # the script that is run, and its main
    "main.py": ("resnet-20-cifar-10", train),
    "lifeLongDataGeneator.py": ("lifelong_data_generation", main_tasks),
    "replayDataGenerator.py": ("lifelong_data_generation", main_replay),
    "prepare_images.py": ("lifelong_data_generation", main_prepare),
}
BLOCK = re.compile(r"```console\n(.*?)```", re.S)


def blocks() -> list[str]:
    """The sessions of the page."""
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def play(block: str, tiny: Tiny, folder: Path) -> tuple[str, list[int]]:
    """The block with the answers that its programs give in ``folder``, and their exit codes."""
    shutil.copytree(tiny.images, folder / "images")
    shutil.copytree(tiny.csvs, folder / "csvs")
    lines, codes = [], []
    before, typed = Path.cwd(), sys.argv
    os.chdir(folder)
    try:
        for line in (line for line in block.splitlines() if line.startswith("$ ")):
            lines.append(line)
            first, *words = shlex.split(line[2:]) if line.startswith(("$ python ", "$ lifequant ")) else [""]
            if not first:
                subprocess.run(["bash", "-c", line[2:]], check=True, stdin=subprocess.DEVNULL)
                continue
            called, main = "lifequant", command
            if first == "python":
                script, *words = words
                place, main = PROGRAMS[script]
                called = str(TOP / place / script)
            said, sys.argv = io.StringIO(), [called, *words]
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
                codes.append(run_main(main, words))
            text = said.getvalue().replace(str(folder), "<here>").replace(os.path.relpath(TOP), "lifequant")
            lines.append(text.replace(str(TOP), "<lifequant>").rstrip("\n"))
    finally:
        os.chdir(before)
        sys.argv = typed
    return "\n".join(lines) + "\n", codes


def main() -> None:
    with tempfile.TemporaryDirectory() as top:
        images = write_images(Path(top) / "images")
        csvs = write_csvs(images, Path(top) / "csvs")
        tiny, count = Tiny(images, csvs, csvs), iter(range(10**6))

        def anew(found: re.Match[str]) -> str:
            folder = Path(top) / str(next(count))
            folder.mkdir()
            return f"```console\n{play(found[1], tiny, folder)[0]}```"

        PAGE.write_text(BLOCK.sub(anew, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
