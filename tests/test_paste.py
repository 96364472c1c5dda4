"""The shell blocks of README and docs/workflow.md, pasted in order into one shell at a clone's top, in small."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.paste import make_commands
from support.tiny import write_images

TOP = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/workflow.md")
FOLDERS = ("docs", "lifequant", "lifelong_data_generation", "resnet-20-cifar-10", "scripts")
BLOCK = re.compile(r"^```shell\n(.*?)^```$", re.DOTALL | re.MULTILINE)
ELSEWHERE = 'echo "block {n} of {page} ends in $PWD" >&2; exit 1'


def script(top: Path, texts: dict[str, str]) -> str:
    """All shell blocks of the pages ``texts`` as one bash script, which stops at the first command that fails and where a block
    ends in another folder than ``top``."""
    lines = ["set -e"]
    for page, text in texts.items():
        for n, block in enumerate(BLOCK.findall(text)):
            lines += [
                f"echo '# block {n} of {page}'",
                block,
                f'[ "$PWD" = "{top}" ] || {{ {ELSEWHERE.format(n=n, page=page)}; }}',
            ]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def pasted(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess, str]:
    """(a copy of the project after all blocks, how bash ended, what the commands printed)."""
    folder = tmp_path_factory.mktemp("paste")
    top, pipes = folder / "clone", folder / "bin"
    for name in FOLDERS:
        more = ("results",) if name.startswith("resnet") else ()  # large, and nothing that a block needs
        hidden = shutil.ignore_patterns("__pycache__", "experiment", "cifar100*", "*.pt", *more)
        shutil.copytree(TOP / name, top / name, ignore=hidden)
    shutil.copy(TOP / "pyproject.toml", top)
    for name in ("quickstart.sh", "test.sh"):  # these have tests of their own; here it is enough that they are there
        (top / "scripts" / name).write_text("exit 0\n")
    write_images(top / "data_dir" / "birds")
    make_commands(pipes)
    environment = {**os.environ, "PYTHONPATH": str(top), "PATH": f"{pipes}:/usr/bin:/bin"}
    with (folder / "log").open("w") as log:
        words = [sys.executable, str(TOP / "tests" / "support" / "paste.py"), str(pipes)]
        server = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log, env=environment)
        try:
            assert server.stdout.readline() == b"ready\n", (folder / "log").read_text()
            shell = ["bash", "-c", script(top, {page: (TOP / page).read_text(encoding="utf-8") for page in PAGES})]
            done = subprocess.run(shell, cwd=top, env=environment, capture_output=True, text=True, timeout=200)
        finally:
            server.kill()
            server.wait()
    return top, done, (folder / "log").read_text()


def test_every_block_runs(pasted):
    _, done, log = pasted
    assert done.returncode == 0, done.stdout + done.stderr + log[-3000:]


def test_what_was_trained_is_what_was_made(pasted):
    """Each run has the data that the block names: all of its classes and images, with no long tail."""
    top, _, _ = pasted
    author = top / "resnet-20-cifar-10"
    runs = {
        top / "experiment/cifar100_32bit": ("cifar100", 1, 32),
        top / "experiment/cifar100_ours": ("cifar100", 3, 4),
        top / "experiment/birds": ("birds", 3, 4),
        top / "experiment/birds_64": ("birds", 3, 4),
        author / "pretrained/res20_32bit": ("cifar100", 1, 32),
        author / "experiment/ours/resnet/t_4bit_pre32bit": ("cifar100", 3, 4),
        author / "experiment/life_q/ours_/resnet/t_4_8_025_3": ("cifar100", 3, 4),
        author / "experiment/ladder/2bit": ("cifar100", 3, 2),
    }
    for folder, (data, tasks, bits) in runs.items():
        found = json.loads((folder / "results.json").read_text())
        settings = json.loads((folder / "config.json").read_text())
        csv_dir = Path(settings["csv_dir"])
        base = author if folder.is_relative_to(author) else top
        assert json.loads((base / csv_dir / "dataset.json").read_text())["image_root"] == str(top / "data_dir" / data)
        assert (len(found["tasks"]), settings["bitW"], settings["lt_gamma"]) == (tasks, bits, 1)
        images = {"cifar100": 4, "birds": 8}[data]
        assert all(task["train_images"] == images * len(task["classes"]) for task in found["tasks"])


def test_a_bad_block_is_found(tmp_path):
    """One that ends in another folder, one whose first command fails; neither is hidden by a good one."""
    good = "```shell\ncd /\ncd {top}\n```\n"
    for bad, said in (("cd /", "block 1 of a.md ends in /\n"), ("false\ntrue", "")):
        texts = {"a.md": f"{good}text\n```shell\n{bad}\n```\n{good}".replace("{top}", str(tmp_path))}
        words = ["bash", "-c", script(tmp_path, texts)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr == said and done.stdout.endswith("# block 1 of a.md\n")
