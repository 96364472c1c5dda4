"""scripts/gpu_check.py: its report, what it makes of checks that fail, hang or come too late. The checks themselves need minutes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lifequant.common.arguments import run_main

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu_check  # noqa: E402
from gpu_checking import checks, report, site  # noqa: E402
from gpu_checking.report import Call, Row  # noqa: E402
from gpu_checking.site import Failed, Site, TimeUp  # noqa: E402


@pytest.fixture
def place(tmp_path) -> Site:
    return Site(tmp_path, "cpu", time.monotonic() + 60)


@pytest.fixture
def checked(tmp_path, monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the command with other checks: exit code, report, what was printed."""

    def run(*pairs: tuple[str, Callable], minutes: float = 1) -> tuple[int, str, str]:
        monkeypatch.setattr(gpu_check, "CHECKS", pairs)
        out = tmp_path / "a" / "report.md"
        code = run_main(gpu_check.main, ["--device", "cpu", "--minutes", str(minutes), "--out", str(out)])
        return code, out.read_text(encoding="utf-8"), capsys.readouterr().out

    return run


def python(code: str) -> Callable[[Site], tuple[str, str]]:
    return lambda place: (report.OK, place.call(sys.executable, "-c", code).out.strip())


def line_of(text: str, name: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| {name} |"))


def test_report():
    calls = [
        Call(["py thon", "/w/x/run.py", "--flags=--a /w/x"], {"A": "1"}, 0, "fine\n", "", 2),
        Call(["python", "b"], {}, 3, "", "Traceback\nValueError: no\n", 4, bad=True),
    ]
    rows = [Row("good", report.OK, "a|b", 1.4, calls), Row("wrong", report.FAULT, "why", 2, calls)]
    rows += [Row("speed", report.MEASURED, "7", more="| more |"), Row("other", report.SKIPPED, "no time left")]
    text = report.markdown(["date: now"], rows, ["last"], {"/w/x": "work"})
    assert "- date: now" in text and "Still to come: last." in text and "\nwork=/w/x\n" in text
    assert line_of(text, "good") == "| good | ok | a/b | 1 |"
    assert line_of(text, "other") == "| other | skipped | no time left | 0 |"
    assert text.count("A=1 'py thon' $work/run.py \"--flags=--a $work\"\npython b\n") == 2
    assert text.count("The last lines") == 1 and "(exit code 3, 4 s) of\n\n`python b`" in text
    assert "Traceback\nValueError: no\n```" in text and "fine" not in text
    assert text.endswith("### speed: measured\n\n| more |\n")


def test_a_failing_check_is_a_fault_and_the_rest_goes_on(checked):
    """One whose command fails, one that fails itself; the report is there in between; the runs' files are kept."""
    seen = []

    def looks(place: Site) -> tuple[str, str]:
        seen.append(place.folder.parent.joinpath(place.folder).is_dir())
        return report.OK, "here"

    code, text, printed = checked(
        ("fails", python("import sys; print('said'); sys.exit('broken: why')")),
        ("raises", lambda place: 1 / 0),
        ("looks", looks),
    )
    assert code == 1 and seen == [True]
    assert "| fails | FAULT | exit code 1: broken: why |" in text and "\nsaid\nbroken: why\n" in text
    assert "| raises | FAULT | the check itself failed: ZeroDivisionError: division by zero |" in text
    assert "| looks | ok | here |" in text and "Still to come" not in text
    assert line_of(printed, "fails") in text and "report.md" in printed
    folder = Path(re.search(r"the runs' files: (.*)", printed)[1])
    assert folder.is_dir()
    folder.rmdir()


def test_the_report_is_written_after_each_check(checked, tmp_path):
    def reads(place: Site) -> tuple[str, str]:
        text = (tmp_path / "a" / "report.md").read_text(encoding="utf-8")
        assert "| first | ok | x |" in text and "Still to come: second." in text
        assert str(place.folder) in text
        return report.MEASURED, "read"

    code, text, printed = checked(("first", python("print('x')")), ("second", reads))
    assert code == 0 and "| second | measured | read |" in text and "files" not in printed.splitlines()[-1]
    assert not Path(re.search(r"^work=(.*)$", text, re.MULTILINE)[1]).exists()


def test_what_comes_too_late_is_left_out(checked):
    def ends(place: Site) -> tuple[str, str]:
        place.deadline = time.monotonic() + site.LEAST - 1
        return report.OK, "done"

    code, text, _ = checked(("first", ends), ("second", python("print('x')")))
    assert code == 0 and "| second | skipped | no time left (--minutes gives more) |" in text


def test_a_hang_is_a_fault_and_the_end_of_the_time_is_none(place, monkeypatch):
    """Whatever the command has started dies with it."""
    forks = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
    child = f"import time; time.sleep(1.5); open({str(place.folder / 'alive')!r}, 'w')"
    with pytest.raises(Failed, match="no end after 1 s: it said nothing"):
        place.call(sys.executable, "-c", forks, child, limit=1)
    assert place.calls[0].bad and place.calls[0].code is None
    monkeypatch.setattr(site, "LEAST", 0)
    place.deadline = time.monotonic() + 1
    with pytest.raises(TimeUp, match="the time was up 1 s after its start"):
        place.call(sys.executable, "-c", "import time; time.sleep(60)")
    time.sleep(0.7)
    assert not (place.folder / "alive").exists()


def test_an_interruption_ends_what_runs(place, monkeypatch):
    """The methods that wait for their turn do not begin."""

    def train(name: str, **how: str) -> None:
        place.call(sys.executable, "-c", "import time; time.sleep(60)")

    def interrupted(self, work: Callable, names: list[str]) -> None:
        futures = [self.submit(work, name) for name in names]
        time.sleep(0.5)
        assert not any(future.done() for future in futures)
        raise KeyboardInterrupt

    monkeypatch.setattr(place, "train", train)
    monkeypatch.setattr(checks.ThreadPoolExecutor, "map", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        checks.check_methods(place)
    assert time.monotonic() - began < 10 and {call.code for call in place.calls} == {-9}


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run_main(gpu_check.main, ["--out", str(tmp_path / "report.md")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no CUDA GPU here" in error and "--device cpu" in error
    assert not list(tmp_path.iterdir())
    assert run_main(gpu_check.main, ["--device", "cpu", "--out", str(tmp_path)]) == 2
    assert "this is a folder" in capsys.readouterr().err


def test_torch_says_what_is_looked_for():
    """A graph break, a recompilation and a skipped CUDA graph, as this version of torch logs them."""
    code = """
import torch
from torch._inductor.cudagraph_utils import log_cudagraph_skip_and_bump_counter
def broken(x):
    x = x + 1
    torch._dynamo.graph_break()
    return x + 1
torch.compile(broken, backend="eager")(torch.ones(2))
whole = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
whole(torch.ones(2)), whole(torch.ones(3))
log_cudagraph_skip_and_bump_counter("skipping cudagraphs due to cpu device")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | checks.LOGS)
    assert done.returncode == 0, done.stderr
    assert len(checks.BREAK.findall(done.stderr)) == 1
    assert checks.RECOMPILED.findall(done.stderr) == ["<lambda>"]
    assert checks.NO_GRAPH.findall(done.stderr) == ["cpu device"]


@pytest.mark.parametrize(
    ("log", "verdict", "words"),
    [
        ("", report.OK, "0 graph breaks, 0 recompilations, CUDA graphs skipped 0 times"),
        ("V [0/0] [__graph_breaks] Graph break in user code at a.py:1", report.FAULT, "1 graph breaks"),
        ("V [0/1] [__recompiles] Recompiling function f in a.py:1", report.OK, "1 recompilations (f)"),
        (
            "W [__cudagraphs] skipping cudagraphs due to cpu device (x)\n",
            report.FAULT,
            "skipped 1 times (cpu device (x))",
        ),
    ],
)
def test_compiled_step(place, monkeypatch, log, verdict, words):
    place.device = "cuda"
    monkeypatch.setattr(place, "train_once", lambda **how: Call([], {}, 0, "", log, 9))
    monkeypatch.setattr(place, "results", lambda name: {"time_share": {"compile_seconds": 5.0}})
    found = checks.check_compiled(place)
    assert found[0] == verdict and words in found[1] and (verdict == report.OK or log.strip() in found[2])
    monkeypatch.setattr(place, "results", lambda name: {"time_share": {"compile_seconds": 0.0}})
    assert checks.check_compiled(place)[0] == report.FAULT


def test_methods(place, monkeypatch):
    """Ours comes first; what fails is named with its reason, what the time does not allow is named."""
    errors = {"ewc": Failed("exit code 1: no"), "mas": Failed("exit code 1: no"), "si": TimeUp("no time left")}
    begun = []

    def train(name: str, method: str, **how: str) -> None:
        begun.append(method)
        if method in errors:
            raise errors[method]

    monkeypatch.setattr(place, "train", train)
    verdict, text = checks.check_methods(place)
    count = len(checks.ordered())
    assert verdict == report.FAULT and checks.ordered()[0] == "ours" and set(begun) == set(checks.ordered())
    assert text.startswith(f"{count - 3} of {count} methods") and text.endswith(
        "; ewc, mas: exit code 1: no; no time left for si"
    )
    del errors["ewc"], errors["mas"]
    assert checks.check_methods(place)[0] == report.OK


def test_a_run_is_made_once(place, monkeypatch):
    """And where it leaves no results, whoever wants it fails."""
    made = []
    monkeypatch.setattr(place, "digits", lambda: place.folder)
    monkeypatch.setattr(place, "call", lambda *words, **how: made.append(words) or Call(words, {}, 0))
    for _ in range(2):
        with pytest.raises(Failed, match=r"results\.json can't be read"):
            place.train_once("run", method="ours")
    (place.folder / "other").mkdir()
    (place.folder / "other" / "results.json").write_text('{"a": 1}')
    assert place.train_once("other", method="ours") is place.train_once("other", method="ours")
    assert len(made) == 2 and place.results("other") == {"a": 1}


def test_extrapolation():
    found = {
        "time_share": {"startup_seconds": 10.0, "compile_seconds": 20.0},
        "seconds_by_part": {"training": 99.0, "method": 5.0, "evaluation": 5.0},
        "tasks": [{"train_images": 1000, "replay_images": 0}, {"train_images": 900, "replay_images": 100}],
        "images_per_second": 100.0,
        "seconds": 60.0,
    }
    text = checks.extrapolated(found, True)  # 50 epochs x 2,000 images / 100 images/s + 40 s
    assert "so 50 take about 17 min" in text and "40 s for start-up" in text and "Assumed" in text
