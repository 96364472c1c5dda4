"""scripts/sweep.py and search.py: runs shared and never run again, failures kept apart, what a search takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from lifequant.common.arguments import run_main
from lifequant.common.errors import UserError
from lifequant.experiments import grid as grid_file
from lifequant.experiments import result_files, same_runs, search, sweep

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


GRID = """
[tasks]
dataset = "tiny"
num_tasks = 2
diminish_rate = 100
images_per_class = 6
[flags]
num_epochs = 1
image_size = 8
train_batch_size = 6
compile = "off"
[rows.replay]
method = "replay"
[rows."more replay"]
method = "replay"
replay_rate = 0.5
[rows.bad]
method = "ours"
lr = 1e30
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four classes of a color each."""
    root = tmp_path_factory.mktemp("images")
    for label in range(4):
        for side, count in (("train", 6), ("test", 2)):
            folder = root / side / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (60 * label, 20 * i, 255 - 60 * label)).save(folder / f"{i}.png")
    return root


def write(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text, encoding="utf-8")
    return path


def called(grid: Path, images: Path, out: Path, *more: str) -> SimpleNamespace:
    """A sweep in this process, which starts its runs as processes."""
    words = [str(grid), "--data_dir", str(images), "--out", str(out), *more]
    with redirect_stdout(StringIO()) as told, redirect_stderr(StringIO()) as said:
        code = run_main(sweep.main, words)
    return SimpleNamespace(returncode=code, stdout=told.getvalue(), stderr=said.getvalue())


@pytest.fixture(scope="module")
def swept(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    return folder, called(write(folder, GRID), images, folder / "out", "--jobs", "2")


def test_a_failed_run_is_kept_apart_and_the_rest_go_on(swept):
    folder, ended = swept
    assert ended.returncode == 1 and "2 of 3 runs finished" in ended.stdout, ended.stderr
    shown = sorted(path.parent.parent.name for path in (folder / "out" / "grid").rglob("results.json"))
    assert shown == ["more replay", "replay"]
    (line,) = [path.read_text() for path in (folder / "out" / "failed").glob("*/failed.txt")]
    assert "diverged" in line and "failed: bad/seed0: " + line.strip() in ended.stdout


def test_what_has_finished_or_failed_is_not_run_again(swept, images):
    folder, _ = swept
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "out" / "runs").rglob("*.pt")}
    again = called(folder / "grid.toml", images, folder / "out")
    assert again.returncode == 1 and "0 to do" in again.stdout
    assert stamps == {path: path.stat().st_mtime_ns for path in (folder / "out" / "runs").rglob("*.pt")}


def test_results_alone_are_enough(swept, images, tmp_path):
    """Of runs whose folders are gone, shown results are taken; what can't begin from them any more begins anew."""
    folder, _ = swept
    shutil.copytree(folder / "out" / "grid" / "replay", tmp_path / "kept" / "any name")
    told = called(folder / "grid.toml", images, tmp_path / "out", "--have", str(tmp_path / "kept"), "--dry_run").stdout
    assert "3 runs, 2 to do" in told and told.count("finished") == 2 and "after task 0" not in told


def test_what_a_former_grid_has_shown_goes_where_its_run_is_kept(swept, tmp_path):
    folder, _ = swept
    view = tmp_path / "view"
    shutil.copytree(folder / "out" / "grid", view)
    text = GRID.replace("replay_rate = 0.5", "replay_rate = 0.4")
    runs = grid_file.runs_of_grid(grid_file.read_grid(write(tmp_path, text)), folder / "out", "grid")
    with pytest.raises(UserError, match="its run's folder is gone"):
        result_files.clear_former_results(view, runs, tmp_path)
    result_files.clear_former_results(view, runs, folder / "out")
    assert [path.parent.parent.name for path in view.rglob("results.json")] == ["replay"]


def test_a_fork_is_the_run_alone(swept, images, tmp_path):
    """Every tensor, number and curve of the run whose task 0 was another's."""
    folder, _ = swept
    runs = {
        run.name: run
        for run in grid_file.runs_of_grid(grid_file.read_grid(folder / "grid.toml"), folder / "out", "grid")
    }
    fork = runs["more replay/seed0"]
    assert fork.flags["start_task"] == 1 and fork.after == (runs["replay/seed0"].folder,)
    text = GRID.replace('[rows.replay]\nmethod = "replay"\n', "")
    called(write(tmp_path, text), images, tmp_path / "out", "--jobs", "2")
    alone = tmp_path / "out" / "runs" / fork.folder.name
    assert [d for d in same_runs.differences(fork.folder, alone) if not known(d)] == []


def test_what_a_failed_run_should_have_begun_is_begun_by_another(images, tmp_path):
    """One of the runs that share its task 0 trains it for the rest, also if the sweep is called again."""
    text = GRID[: GRID.index("[rows.bad]")].replace(
        "[rows.replay]", '[rows.small]\nmethod = "replay"\nmemory_budget = "1kB"\n[rows.replay]'
    )
    grid, out = write(tmp_path, text), tmp_path / "out"
    small, replay, more = grid_file.runs_of_grid(grid_file.read_grid(grid), out, "grid")
    assert replay.after == more.after == (small.folder,)
    ended = called(grid, images, out)
    assert "2 of 3 runs finished" in ended.stdout and "--memory_budget 1,000 bytes" in ended.stdout, ended.stderr
    config = json.loads((more.folder / "results.json").read_text())["config"]
    assert (
        config["start_task"] == 1
        and not json.loads((replay.folder / "results.json").read_text())["config"]["start_task"]
    )
    shutil.rmtree(more.folder)
    shutil.rmtree(replay.folder)
    told = called(grid, images, out, "--dry_run").stdout
    assert "3 runs, 2 to do" in told and told.count("after task 0 of another") == 1


def known(difference: str) -> bool:
    """What says that a run is a fork, where it lies, and the curves of the task that it did not train."""
    return any(word in difference for word in ("start_task", "from_run", "csv_dir", "task0.pt/config", "curves"))


def test_killed_in_the_middle_and_gone_on_with(swept, images, tmp_path):
    """The sweep is killed outright; its runs go on, the next sweep waits for them and ends with the same numbers."""
    folder, _ = swept
    grid = write(tmp_path, GRID)
    words = [
        sys.executable,
        str(SCRIPTS / "sweep.py"),
        str(grid),
        "--data_dir",
        str(images),
        "--out",
        str(tmp_path / "out"),
        "--jobs",
        "2",
    ]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        if list((tmp_path / "out" / "runs").glob("*/.lock")):
            break
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert "2 of 3 runs finished" in called(grid, images, tmp_path / "out", "--jobs", "2").stdout
    for name in ("replay", "more replay"):
        one, other = ((out / "out" / "grid" / name / "seed0" / "results.json") for out in (folder, tmp_path))
        keys = ("config", "top1", "space_shift", "code_histograms")
        assert [json.loads(one.read_text())[k] for k in keys] == [json.loads(other.read_text())[k] for k in keys]


def test_dry_run_writes_nothing(images, tmp_path):
    told = called(write(tmp_path, GRID), images, tmp_path / "out", "--dry_run").stdout
    assert "3 runs, 3 to do" in told and told.count("to run") == 3 and not (tmp_path / "out").exists()


def test_search_takes_what_gains(monkeypatch, tmp_path):
    """Greedy, against scores that are known: the best part of each round, one that lost is not tried again."""
    gains = {"a": 3.0, "b": 2.0, "c": -4.0}
    asked: list[set[str]] = []

    def scores(rows):
        asked.append(set(rows))
        return {
            row: {"flags": flags, "score": 10 + sum(gains[f] for f in flags if f in gains)}
            for row, flags in rows.items()
        }

    fake = type(
        "Fake", (), {"grid": {"start": {"x": 1}, "parts": {n: {n: 1} for n in gains}}, "scores": staticmethod(scores)}
    )
    found = search.parts(fake, gain=1.0, rounds=5)
    assert found["settings"] == {"x": 1, "a": 1, "b": 1} and found["score"] == 15
    assert asked == [{"start"}, {"1 so far", "1 a a=1", "1 b b=1", "1 c c=1"}, {"2 so far", "2 b b=1"}]


def test_search_never_reads_a_test_image(images, tmp_path):
    """It runs where there is no test folder at all."""
    shutil.copytree(images / "train", tmp_path / "images" / "train")
    text = GRID[: GRID.index("[rows.replay]")].replace("= 6\n[flags]", "= 6\nheld_out = 0.34\n[flags]")
    grid = write(tmp_path, text + "[strength.ewc]\nll_lambda = [1.0, 2.0]\n")
    words = [
        str(grid),
        "--data_dir",
        str(tmp_path / "images"),
        "--out",
        str(tmp_path / "out"),
        "--write",
        str(tmp_path / "found.json"),
    ]
    assert search.main(words) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["chosen"]["ewc"] in (1.0, 2.0) and [row["value"] for row in found["tried"]] == [1.0, 2.0]


def test_slurm_by_its_local_executor(images, tmp_path):
    pytest.importorskip("submitit", reason="submitit is not there (extra slurm)")
    text = GRID[: GRID.index('[rows."more replay"]')]
    ended = called(write(tmp_path, text), images, tmp_path / "out", "--slurm", "--cluster", "local")
    assert "1 of 1 runs finished" in ended.stdout, ended.stderr
