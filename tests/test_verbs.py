"""One command line: verbs, flags alone, and what is printed without a network or a run."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.tiny import arguments, settings

import lifequant
from lifequant.__main__ import VERBS, command
from lifequant.common.arguments import run_main


def test_overview(capsys):
    """All verbs on one screen of 80 columns, before torch is imported."""
    code = "import sys, lifequant.__main__ as m; m.command(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert all(any(line.split()[:1] == [verb] for line in lines) for verb in VERBS)
    assert run_main(command, []) == 0 and capsys.readouterr().out == done.stdout


def test_help_needs_no_torch():
    """Of each verb, of flags alone and of main.py's way in, in one process that has not imported torch by then."""
    code = """
import sys
from lifequant.__main__ import VERBS, main
for argv in [*([verb, flag] for verb in VERBS for flag in ("--help", "-h")), ["--version"]]:
    assert main(argv) == 0 and 'torch' not in sys.modules, argv
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: lifequant") == 2 * len(VERBS) and "--num_epochs NUM_EPOCHS" in done.stdout


def test_help_of_what_is_chosen_is_the_parsers(capsys, monkeypatch):
    """Flags of another method, and of one that a package adds, are not in the stored text."""
    assert command(["train", "--help"]) == 0
    assert "--derpp_alpha" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        command(["train", "--method", "derpp", "--help"])
    assert end.value.code == 0 and "--derpp_alpha" in capsys.readouterr().out


def test_verbs_and_flags(tiny, tmp_path, capsys):
    """``train`` and flags alone are the same; a mistyped verb names the nearest one."""
    flags = arguments(settings(tiny, tmp_path / "run", method="original", num_tasks=1))
    assert run_main(command, flags) == 0
    assert run_main(command, ["train", *flags, "--resume"]) == 0
    assert "this run is finished" in " ".join(capsys.readouterr().out.split())
    assert run_main(command, ["list"]) == 0 and "ours" in capsys.readouterr().out
    assert run_main(command, ["--version"]) == 0 and lifequant.__version__ in capsys.readouterr().out
    assert run_main(command, ["tarin"]) == 2
    assert (
        capsys.readouterr().err
        == "lifequant: error: unknown verb 'tarin'; did you mean 'train'? (lifequant --help lists them)\n"
    )
