"""Command lines in messages: what to type next, called as this program was called.

A script of the clone (``python main.py``) names scripts, for LifeQuant need not be installed then; ``lifequant`` and
``python -m lifequant`` name verbs.
"""

from __future__ import annotations

import itertools
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from lifequant.common.files import TOP

SCRIPTS = {  # verb: the script of the clone that does the same
    "train": "resnet-20-cifar-10/main.py",
    "images": "lifelong_data_generation/prepare_images.py",
    "tasks": "lifelong_data_generation/lifeLongDataGeneator.py",
    "replay": "lifelong_data_generation/replayDataGenerator.py",
    "sweep": "scripts/sweep.py",
}


def words_of(verb: str) -> list[str]:
    """The words that call a verb: ``lifequant tasks``, or ``python lifelong_data_generation/lifeLongDataGeneator.py``."""
    if TOP and _is_script(sys.argv[0]) and TOP in Path(sys.argv[0]).resolve().parents:
        return ["python", os.path.relpath(TOP / SCRIPTS[verb])]
    return [*_lifequant(), *([verb] if verb != "train" else [])]


def command(verb: str, *more: str) -> str:
    """The command line of a verb, quoted for a shell."""
    return shlex.join([*words_of(verb), *more])


def prepare_command(name: str, folder: str) -> str:
    """The command that makes the images of the data set ``name``, where ``files.candidates(folder)`` will find them."""
    known, given_by_hand = ("cifar10", "cifar100", "digits"), ("office31", "imageclef_da", "tinyimagenet")
    dataset = name if name in (*known, *given_by_hand) else "|".join(known)
    source = " --source ARCHIVE" if name in given_by_hand else ""
    given = Path(folder).expanduser()
    relative = Path(*given.parts[1:]) if given.parts[:1] == ("src",) else given
    out = os.path.relpath((TOP or Path.cwd()) / relative)
    return f"{command('images')} --dataset {dataset}{source} --out {shlex.quote(out)}"


def going_on(argv: Sequence[str]) -> str:
    """The command that goes on with the run of the command line ``argv``: as it was typed, with --resume."""
    program = [sys.orig_argv[0], sys.argv[0]] if _is_script(sys.argv[0]) else _lifequant()
    if "LOCAL_RANK" in os.environ and (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        program = ["torchrun", "--nproc_per_node", processes, *program[1:]]
    words = argv[argv[:1] == ["train"] :]
    return shlex.join([*program, *_without(words, "--resume", "--reset"), "--resume"])


def _is_script(called: str) -> bool:
    return called.endswith(".py") and Path(called).name != "__main__.py"


def _lifequant() -> list[str]:
    typed = sys.orig_argv
    by_module = ("-m", "lifequant") in itertools.pairwise(typed)
    return [typed[0], "-m", "lifequant"] if by_module else ["lifequant"]


def _without(argv: Sequence[str], *flags: str) -> list[str]:
    """``argv`` without flags that take one value at most."""
    values = {i for i in range(1, len(argv)) if argv[i - 1] in flags and not argv[i].startswith("-")}
    return [word for i, word in enumerate(argv) if i not in values and word.split("=", 1)[0] not in flags]
