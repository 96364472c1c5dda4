"""``lifequant``, ``python -m lifequant`` and resnet-20-cifar-10/main.py: one command line with verbs.

What a verb needs is imported when it is called, so that ``lifequant --help`` does not wait for torch. For the same reason the
help of each verb is a text in help/, which scripts/make_flags_page.py writes.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import lifequant
from lifequant.common.arguments import run_main
from lifequant.common.commands import going_on
from lifequant.common.errors import UserError, closest, one_line
from lifequant.runtime import preemption

HELP = Path(__file__).resolve().parent / "help"
VERBS = {  # verb: (module and function, what it does)
    "train": ("lifequant.__main__:train", "train a network on one task after another (flags alone mean this)"),
    "images": ("lifequant.data.create.images:main_prepare", "write CIFAR, Office-31 and others as folders of images"),
    "tasks": ("lifequant.data.create.tasks:main_tasks", "write the task CSVs of a folder of images"),
    "replay": ("lifequant.data.create.replay:main_replay", "write the replay CSVs of task CSVs"),
    "counts": ("lifequant.data.create.class_counts:main_counts", "count the classes of each task"),
    "export": ("lifequant.exporting.command:main", "write a network as ONNX on integer kernels, or packed"),
    "sweep": ("lifequant.experiments.sweep:main", "run a grid of runs, a few at a time"),
    "search": ("lifequant.experiments.search:main", "find settings on held-out training images"),
    "report": ("lifequant.experiments.report:main", "make tables and pictures of many runs"),
    "compare": ("lifequant.experiments.compare:main", "compare a few runs"),
    "predict": ("lifequant.predict_images:main", "print the classes that a trained model sees in images"),
    "cache": ("lifequant.data.cache_folder:main_cache", "list the decoded images on disk, or clear them"),
    "list": ("lifequant.__main__:list_names", "print methods, penalties, quantizers, models and presets"),
}


def train(argv: Sequence[str]) -> int:
    """Parse, then train, test or list. Raises UserError."""
    from lifequant import options

    if "--list" in argv:
        return list_names([])
    config, notes = options.parse(argv)
    if config.test_only:
        _function("lifequant.evaluate_only:test")(config, notes, options.typed(argv))
        return 0
    job = "lifequant.progressive_bits:run" if config.bit_schedule else "lifequant.train:run"
    try:
        with preemption.handled(going_on(argv)):
            _function(job)(config, notes)
    except preemption.Stopped as stopped:
        code, text = preemption.ending(stopped, bool(config.resume))
        print(f"lifequant: {text}", file=sys.stderr)
        return code
    return 0


def list_names(argv: Sequence[str]) -> int:
    """Print what is registered."""
    from lifequant import registry
    from lifequant.common.arguments import Parser

    Parser(description="Print methods, penalties, quantizers, models and presets by their names.").parse_args(
        list(argv)
    )
    print(registry.describe())
    return 0


def command(argv: Sequence[str]) -> int:
    """The verb ``argv[0]``, or ``train`` where the first word is a flag. Raises UserError."""
    first = argv[0] if argv else "--help"
    if first in ("-h", "--help"):
        print(_overview())
        return 0
    if first == "--version":
        print(f"lifequant {lifequant.__version__}")
        return 0
    if first.startswith("-"):
        return train(argv)
    if first not in VERBS:
        raise UserError(f"unknown verb {first!r}{closest(first, VERBS)} (lifequant --help lists them)")
    if list(argv[1:]) in (["-h"], ["--help"]):
        print((HELP / f"{first}.txt").read_text(encoding="utf-8"), end="")
        return 0
    if first != "train":
        sys.argv[0] = f"lifequant {first}"  # which usage lines begin with
    return _function(VERBS[first][0])(argv[1:]) or 0


def _function(name: str):
    module, function = name.split(":")
    return getattr(import_module(module), function)


def _overview() -> str:
    lines = [f"  {verb:<9}{text}" for verb, (_, text) in VERBS.items()]
    return "\n".join(
        [
            "usage: lifequant [VERB] [FLAGS]",
            "",
            "Lifelong quantization-aware training: networks that stay quantized and keep",
            "learning.",
            "",
            *lines,
            "",
            "lifequant VERB --help explains a verb's flags; lifequant train --help has those",
            "of training. lifequant --version prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command line; 1 after a fault of LifeQuant's own, with its traceback and what to do."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return run_main(command, argv)
    except Exception:  # run_main has dealt with the user's mistakes
        traceback.print_exc()
        print(f"lifequant: {one_line(_after_a_fault(argv))}", file=sys.stderr)
        return 1


def _after_a_fault(argv: Sequence[str]) -> str:
    """How to report a fault, and where the run's state lies."""
    from lifequant import options
    from lifequant.checkpointing import checkpoint

    report = "this is a fault of LifeQuant's: please report it with the lines above"
    try:
        last = Path(options.parse(argv[argv[:1] == ["train"] :])[0].job_dir) / "checkpoint" / checkpoint.LAST
        state, last = checkpoint.read_last(last, lambda _: None)
    except Exception:  # whatever it is, it must not hide the fault
        return f"{report}; there is no checkpoint to go on with"
    return f"{report}; --resume goes on from task {state['task_index']}, step {state['step']}, which {last} has"


if __name__ == "__main__":
    sys.exit(main())
