"""A sweep's time left, against runs whose times are known: a fake clock, and an executor that takes what it is told."""

from __future__ import annotations

import json
import os

import pytest
from PIL import Image

from lifequant.common.text import duration
from lifequant.experiments import grid, sweep

FIXED, FLOAT = 9.0, 1 / 30  # seconds of a run before its steps, and of an image in a float network
PACE = {"original": 1.5, "ours": 2.1, "ewc": 1.7}  # an image in a quantized network, in units of a float network's
IMAGES = 12  # a class
GRID = """
[tasks]
dataset = "tiny"
num_tasks = 3
diminish_rate = 100
[source]
num_epochs = 8
[flags]
num_epochs = 4
bitW = [32, 4]
seed = [0, 1, 2]
[rows.original]
method = "original"
[rows.ewc]
method = "ewc"
[rows.ours]
method = "ours"
"""


class Clock:
    """Stands for the module time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Known:
    """An executor whose runs take their time on the clock and then write results."""

    queues = False

    def __init__(self, runs: list[grid.Run], clock: Clock, slots: int) -> None:
        self.by_folder, self.clock, self.slots = {str(run.folder): run for run in runs}, clock, slots

    def start(self, arguments, log):
        run = self.by_folder[arguments[arguments.index("--job_dir") + 1]]
        begin = self.clock.now + FIXED
        return run, begin, begin + steps(run, run.flags.get("start_task", 0)), log

    def code(self, handle):
        run, begin, end, log = handle
        if self.clock.now < end:
            if self.clock.now > begin and not log.exists():  # the first epoch's line
                log.write_text(f"task 0 epoch 1/4  loss 1.234  {duration(end - self.clock.now)} left\n")
                os.utime(log, (self.clock.now, self.clock.now))
            return None
        share = {"startup_seconds": FIXED / 2, "compile_seconds": 0.0}  # python's own start is not in it
        found = {"config": {}, "seconds": steps(run, 0), "time_share": share}
        (run.folder / "results.json").write_text(json.dumps(found))
        return 0


def steps(run: grid.Run, first: int) -> float:
    """Seconds of a run's steps from a task on: 4 classes each, and for ours 20 % of those before."""
    replay = 0.2 if run.flags["method"] == "ours" else 0.0
    images = sum(IMAGES * 4 * (1 + replay * task) for task in range(first, run.flags.get("num_tasks", 3)))
    pace = PACE[run.flags["method"]] if run.flags["bitW"] < 32 else 1.0
    return images * run.flags["num_epochs"] * FLOAT * pace


class Bar:
    """Stands for tqdm; keeps what it was told to show."""

    def __init__(self, *_, **__) -> None:
        Bar.shown = []

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...

    def update(self, n: int = 1) -> None: ...

    def set_postfix_str(self, text: str) -> None:
        Bar.shown.append(text)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for folder in (root / side / f"class{label:02}" for side in ("train", "test") for label in range(12)):
        folder.mkdir(parents=True)
        for i in range(IMAGES):
            Image.new("RGB", (1, 1)).save(folder / f"{i}.png")
    return root


@pytest.mark.parametrize("slots", [1, 2, 3])
@pytest.mark.parametrize("forked", [True, False])
def test_time_left(images, tmp_path, monkeypatch, slots, forked):
    """Right within 30 % as soon as a run has said what it has left itself; nothing is left at the end."""
    text = GRID if forked else GRID.replace('[rows.ewc]\nmethod = "ewc"\n', "")
    (tmp_path / "grid.toml").write_text(text)
    runs = grid.runs_of_grid(grid.read_grid(tmp_path / "grid.toml"), tmp_path, "grid")
    assert any("from_run" in run.flags for run in runs) == forked
    clock = Clock()
    monkeypatch.setattr(sweep, "time", clock)
    monkeypatch.setattr(sweep, "tqdm", Bar)
    this = sweep.Sweep(runs, images, tmp_path, tmp_path / "view", Known(runs, clock, slots), {})
    told, advance = [], this.advance
    monkeypatch.setattr(
        this,
        "advance",
        lambda bar: (advance(bar), told.append((clock.now, this.left(), len(list(tmp_path.rglob(sweep.LOG))))))[0],
    )
    this.go()
    assert len(this.times) == len(runs)
    for share in (0.0, 0.1, 0.3, 0.5, 0.8):
        now, left = next((now, left) for now, left, known in told if known and now >= share * clock.now)
        assert left == pytest.approx(clock.now - now, rel=0.3), share
    assert told[-1][1] == 0 and "left" not in Bar.shown[-1] and "left" in Bar.shown[-2]
