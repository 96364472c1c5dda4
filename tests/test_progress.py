"""What a run says while it goes on: a header, epoch lines where there is no terminal, the time left, replay counts."""

from __future__ import annotations

import re
import time

import pytest
from support.tiny import train
from test_time import Hours

from lifequant import options
from lifequant import train as loop
from lifequant.common import text
from lifequant.common.errors import UserError
from lifequant.results import results
from lifequant.training import progress

NARROW = True  # see conftest.py


def test_where_there_is_no_terminal(tiny, tmp_path, capsys):
    """Header, a line for each epoch, and at the end where the results are; all within 80 columns, and nothing on stderr."""
    found = train(tiny, tmp_path / "run", method="replay", num_epochs=2, replay_rate=0.25)
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == "" and max(map(len, (line for line in lines if str(tmp_path) not in line))) <= 80
    parameters = 269_722 - 4 * 65 + 40  # He et al. 2016 for 10 classes; here are 6, and 40 scales
    assert f"network   resnet20, {parameters:,} parameters" in lines
    for task in (0, 1):
        for epoch in (1, 2):
            at = next(line for line in lines if line.startswith(f"task {task} epoch {epoch}/2"))
            assert re.search(r"  loss \d+\.\d{3}  top-1 \d+\.\d %  [\d.]+ images/s  \d+ s left$", at), at
    # Task 0 has four classes of eight images, of which a quarter is stored; task 1 has two of these classes itself.
    assert "task 1: 4 classes, 32 new, 4 replayed images (8 stored, 4 are new)" in lines
    assert [found["tasks"][1][key] for key in ("replay_images", "stored_images")] == [4, 8]
    assert found["memory_bytes"]["replay"] == 8 * 3 * 16 * 16
    assert re.search(r"finished in \d+ s; results.json and model_best.pt are in\s+\S+/run$", out.strip())
    steps = re.search(r"steps: (\d+), images a step: 8", out)
    assert int(steps[1]) == 2 * (32 // 8 + 32 // 4)  # half of a batch of task 1 is stored images


def test_terminal(tiny, tmp_path, monkeypatch, capsys):
    """On a terminal the bar shows what the epoch lines have, in 80 columns; the lines go to the log alone."""
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    train(tiny, tmp_path / "run", method="original", print_freq=1)
    out, err = capsys.readouterr()
    shown = [part.rstrip() for part in err.split("\r")]
    assert any(
        re.match(r"task 1 epoch 1/1  loss \d+\.\d{3}  top-1 \d+\.\d %  [\d.]+ images/s  \d+ s left \|", s)
        for s in shown
    )
    assert max(map(len, shown)) <= 80 and "epoch 1/1" not in out
    assert (tmp_path / "run/logger.log").read_text().count(" epoch 1/1  loss ") == 2


@pytest.mark.parametrize("at_end", [0, 30])
def test_time_left(tiny, tmp_path, monkeypatch, at_end):
    """At steps of a second and ends of tasks of ``at_end`` seconds: right once a task has ended, and before but for its end."""
    hours = Hours(monkeypatch)
    hours.slow(monkeypatch, loop, "training_step", 1)
    hours.slow(monkeypatch, results, "evaluate", at_end)
    told = []
    original = loop.end_epoch

    def end_epoch(run, task, *rest):
        told.append((task.task_index, time.perf_counter(), progress.seconds_left(run)))
        original(run, task, *rest)

    monkeypatch.setattr(loop, "end_epoch", end_epoch)
    train(tiny, tmp_path / "run", csv_dir=tiny.csvs3, method="replay", num_epochs=3, print_freq=1000)
    end = time.perf_counter()
    assert len(told) == 9
    for task, at, left in told:
        ends_unknown = 3 * at_end if task == 0 else 0
        assert left == pytest.approx(end - at - ends_unknown, rel=0.05, abs=2), (task, at)


def test_time_is_for_a_reader():
    said = [text.duration(seconds) for seconds in (0.4, 119.4, 120, 3599, 3600, 12_000)]
    assert said == ["0 s", "119 s", "2 min", "1 h 0 min", "1 h 0 min", "3 h 20 min"]


def test_expected_time_is_said_once(tiny, tmp_path, monkeypatch, capsys):
    hours = Hours(monkeypatch)
    hours.slow(monkeypatch, loop, "training_step", 10)
    train(tiny, tmp_path / "run", method="original", num_epochs=3, print_freq=1)
    assert (
        capsys.readouterr().out.count("about 4 min to go, at 0.8 images/s") == 1
    )  # 24 steps of 8 images in 10 s, less the first


def test_long_lines_are_folded():
    words = "warning: " + "word " * 40
    folded = text.wrapped(words.strip())
    assert max(map(len, folded.split("\n"))) <= 80 and folded.split() == words.split()
    assert text.wrapped("a  table    row") == "a  table    row"
    path = "/folder" * 20
    assert path in text.wrapped(f"written to {path}", break_words=False).split()


def test_two_flags_for_the_replay_images():
    with pytest.raises(UserError, match="--buffer_size and --replay_rate both say how many images to store"):
        options.make(method="ours", buffer_size=10, replay_rate=0.2)


def test_help_fits_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser, _ = options.build_parser("rwalk", "lsqplus", penalty="proxq_step")
    assert max(map(len, parser.format_help().splitlines())) <= 80
