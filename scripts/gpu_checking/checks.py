"""The checks of scripts/gpu_check.py. Each takes a Site and returns (verdict, text) or (verdict, text, Markdown for the details).

A check that can't go on raises Failed, TimeUp or whatever happens to it; gpu_check.py makes a row of it.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from gpu_checking.report import FAULT, MEASURED, OK, SKIPPED
from gpu_checking.site import Failed, Site, TimeUp, last_line
from lifequant import registry
from lifequant.common.errors import one_line
from lifequant.common.text import duration

Found = tuple[str, str] | tuple[str, str, str]
KILLED_AT = "checkpoint:18"  # its eighteenth writing: after a few steps of task 1, since one is written after each step
EPOCHS = 50  # a task in the paper's run, as scripts/paper_run.py has it
CLASSES = {"cuda": 100, "cpu": 10}  # of the run of the paper's size
PLACES = 3
GIB, MIB = 2**30, 2**20
# What torch writes to its log of a step that is not one graph, is compiled once more, or runs without its CUDA graph.
BREAK = re.compile(r"\[__graph_breaks\] Graph break\b")
RECOMPILED = re.compile(r"\[__recompiles\] Recompiling function (\S+)")
NO_GRAPH = re.compile(r"(?:skipping cudagraphs due to|Unable to hit fast path of CUDAGraphs because) ([^\n]*)")
NOT_CAPTURED = re.compile(r"graph partitions: \d+ cudagraphable, ([1-9]\d*) non-cudagraphable")
LOGS = {"TORCH_LOGS": "graph_breaks,recompiles,cudagraphs,perf_hints"}
COMPILED = {"name": "ours_compiled", "variables": LOGS, "method": "ours", "compile": "on"}


def check_machine(site: Site) -> Found:
    """Names and versions; the GPU computes; a compiler is there."""
    site.machine = found = site.worker("machine", site.device)
    words = [
        f"torch {found['torch']}",
        f"Triton {found['triton'] or 'missing'}",
        f"compiler {found['compiler'] or 'missing'}",
    ]
    if site.gpu:
        gpu = [f"{found['gpu']} (compute capability {found['capability']}, {found['gpus']} here)"]
        gpu += [f"{found['free'] / GIB:.1f} of {found['total'] / GIB:.1f} GiB free", f"driver {found['driver']}"]
        words = [*gpu, f"CUDA {found['cuda']}", f"cuDNN {found['cudnn']}", *words]
        words.append("bfloat16" if found["bf16"] else "no bfloat16")
    text = ", ".join(words)
    if not found["works"]:
        return FAULT, f"a product of two matrices is wrong: {text}"
    if not found["compiler"] or (site.gpu and not found["triton"]):
        return FAULT, f"torch.compile lacks a compiler or Triton, so runs stay uncompiled: {text}"
    return OK, text


def check_compiled(site: Site) -> Found:
    """Graph breaks, recompilations and skipped CUDA graphs of a compiled run of two tasks."""
    call = site.train_once(**COMPILED)
    results = site.results(COMPILED["name"])
    seconds = (results["time_share"] or {}).get("compile_seconds", 0)
    if not seconds:
        return FAULT, "the run ended well, and compiled nothing"
    breaks, again, skips = (pattern.findall(call.err) for pattern in (BREAK, RECOMPILED, NO_GRAPH))
    text = f"ours learned two tasks in {call.seconds:.0f} s, {seconds:.0f} s of them to compile: {len(breaks)} graph breaks, "
    text += f"{len(again)} recompilations" + (f" ({', '.join(sorted(set(again)))})" if again else "")
    if site.gpu:
        text += f", CUDA graphs skipped {len(skips)} times" + (f" ({skips[0].strip()})" if skips else "")
        parts = sum(map(int, NOT_CAPTURED.findall(call.err)))
        text += f", {parts} parts of graphs are outside of CUDA graphs" if parts else ""
    return (FAULT if breaks or skips else OK), text, quoted_log(call.err)


def quoted_log(log: str) -> str:
    """The first few places where torch says why a step is not one graph or has no CUDA graph, as Markdown."""
    lines = log.splitlines()
    places = [index for index, line in enumerate(lines) if BREAK.search(line) or NO_GRAPH.search(line)][:PLACES]
    return "\n\n".join("\n".join(["```", *map(one_line, lines[at : at + 12]), "```"]) for at in places)


def check_tests(site: Site) -> Found:
    """The tests that need a GPU."""
    file = site.folder / "tests.xml"
    words = ["-m", "pytest", "-q", "-m", "skipif", "tests/test_precision.py", "-p", "no:cacheprovider"]
    call = site.call(sys.executable, *words, "--junitxml", file, codes=(0, 1))
    suite = ElementTree.parse(file).getroot().find("testsuite")
    counts = {name: int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped")}
    wrong = counts["failures"] + counts["errors"]
    passed = counts["tests"] - counts["skipped"] - wrong
    text = f"{passed} of {counts['tests']} passed, {wrong} failed, {counts['skipped']} skipped"
    if wrong or call.code:
        return FAULT, f"{text}: {last_line(call)}"
    return (OK, text) if passed else (SKIPPED, f"all {counts['skipped']} are skipped, since they need a GPU")


def ordered() -> list[str]:
    """All methods, ours first."""
    return sorted(registry.names("method"), key=lambda name: name != "ours")


def short_runs(site: Site, compile: str) -> Found:
    """A run of each method, a few at a time; those that the time does not allow are left out."""
    ended: dict[str, str] = {}  # method: "" or what went wrong

    def one(method: str) -> None:
        how = {"method": method, "compile": compile}
        try:
            if compile == "on" and method == "ours":
                site.train_once(**COMPILED)
            else:
                site.train(f"{method}_{'compiled' if compile == 'on' else 'eager'}", **how)
            ended[method] = ""
        except Failed as failed:
            ended[method] = str(failed)
        except TimeUp:
            pass

    names = ordered()
    with ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // 2))) as pool:
        try:
            list(pool.map(one, names))
        except BaseException:
            site.stop()
            raise
    reasons = sorted(set(filter(None, ended.values())))
    wrong = [name for name in names if ended.get(name)]
    left_out = [name for name in names if name not in ended]
    text = f"{len(ended) - len(wrong)} of {len(names)} methods finish two tasks and leave results.json"
    if wrong:
        text += "".join(f"; {', '.join(name for name in wrong if ended[name] == why)}: {why}" for why in reasons)
    if left_out:
        text += f"; no time left for {', '.join(left_out)}"
    return (FAULT if wrong else OK if ended else SKIPPED), text


def check_methods(site: Site) -> Found:
    return short_runs(site, "off")


def check_methods_compiled(site: Site) -> Found:
    if not site.gpu:
        return SKIPPED, "on the CPU a compilation takes too long; ours was compiled above"
    return short_runs(site, "on")


def straight(site: Site) -> str:
    """The name of a whole run with deterministic algorithms, which is made once."""
    site.train_once(name="deterministic", method="ours", deterministic=True)
    return "deterministic"


def compare(site: Site, name: str, other: str) -> list[str]:
    return site.worker("differences", site.folder / name, site.folder / other)


def check_resume(site: Site) -> Found:
    """Killed and resumed, with --deterministic, against a run that was not."""
    whole = straight(site)
    how = {"method": "ours", "deterministic": True, "checkpoint_seconds": 0}
    site.train("killed", codes=(-9,), variables={"LIFEQUANT_FAULT": KILLED_AT}, **how)
    resumed = site.train("killed", resume=True, **how)
    where = re.search(r"resumed at (task \d+, step \d+)", resumed.out)
    if not where:
        return FAULT, "the second run did not go on where the first one was killed, but began anew"
    found = compare(site, "killed", whole)
    text = f"an uncompiled run was killed by SIGKILL while a checkpoint was written, resumed at {where[1]}"
    if found:
        return FAULT, f"{text}; it differs from the whole run in {len(found)} places, first in {found[0]}"
    return OK, f"{text}; all checkpoints, results and curves are those of the whole run, bit for bit"


def check_deterministic(site: Site) -> Found:
    """The same command twice."""
    whole = straight(site)
    site.train("again", method="ours", deterministic=True)
    if found := compare(site, "again", whole):
        return FAULT, f"two runs with --deterministic differ in {len(found)} places, first in {found[0]}"
    return OK, "two uncompiled runs with --deterministic have the same checkpoints, results and curves, bit for bit"


def check_same_losses(site: Site) -> Found:
    """The losses of two runs without --deterministic."""
    flags = ["--device", site.device, "--cache_dir", str(site.folder / "cache"), "--compile", "off"]
    if not site.gpu:
        flags += ["--num_epochs", "1", "--image_size", "8"]
    losses = []
    for number in (1, 2):
        file = site.folder / f"losses{number}.json"
        site.call(sys.executable, "scripts/loss_curve.py", "--out", file, f"--flags={' '.join(flags)}")
        losses.append(json.loads(file.read_text(encoding="utf-8")))
    pairs = list(zip(*losses, strict=True))
    same = next((step for step, (a, b) in enumerate(pairs) if a != b), len(pairs))
    if same == len(pairs):
        return MEASURED, f"without --deterministic the losses of all {same} steps are the same bit for bit"
    worst = max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)
    text = (
        f"without --deterministic the losses of the first {same} of {len(pairs)} steps are the same bit for bit; later "
    )
    return MEASURED, text + f"they are up to {100 * worst:.2g} % apart"


def check_bf16(site: Site) -> Found:
    """Final loss, accuracy and speed of a run in bfloat16 and one in float32."""
    texts, finite = [], True
    for amp, name in (("off", "float32"), ("bf16", "bf16")):
        call = site.train(name, method="ours", amp=amp, num_epochs=8 if site.gpu else 1)
        results = site.results(name)
        losses = re.findall(r" loss (\S+)", call.out)
        loss = float(losses[-1]) if losses else math.nan
        finite &= math.isfinite(loss)
        speed = results["images_per_second"] or 0
        texts.append(
            f"{name}: loss {loss:.3f} at the end, top-1 {results['average_accuracy']:.1f} %, {speed:,.0f} images/s"
        )
    return (OK if finite else FAULT), "; ".join(texts) + " (uncompiled, batches of 64, so speeds say little)"


def check_memory(site: Site) -> Found:
    if not site.gpu:
        return SKIPPED, "torch counts memory on a GPU only"
    found = {name: size / MIB for name, size in site.worker("memory", 128).items()}
    text = "a step of ours, batch 128, 32 x 32, has at most {eager:,.0f} MiB allocated, compiled {compiled:,.0f} MiB "
    return MEASURED, (text + "({before:,.0f} MiB of it before the step)").format(**found)


def check_speed(site: Site) -> Found:
    """scripts/benchmark.py's figures."""
    kind, sizes = "eager", ("--rounds", 2, "--steps", 1, "--batch", 16)
    if site.gpu:
        kind, sizes = "compiled", ("--rounds", 3, "--steps", 20, "--batch", 128)
    rows = [f"float_{kind}", f"lsq_{kind}", f"ours_{kind}", "ours_eager", "brevitas", "published_scheme"]
    file = site.folder / "speed.json"
    words = ["--rows", ",".join(dict.fromkeys(rows)), *sizes, "--device", site.device, "--json", file]
    call = site.call(sys.executable, "scripts/benchmark.py", *words, codes=(0, 2))
    if not file.exists():
        raise Failed(last_line(call))
    found = json.loads(file.read_text(encoding="utf-8"))
    speeds = [f"{row} {speed:,.0f}" for row, speed in found["images_per_second"].items()]
    ratios = [f"{name} {median:.2f}" for name, (median, _, _) in found["ratios"].items() if name.startswith("ours_")]
    missing = [f"{row}: {why}" for row, why in found["not_there"].items()]
    text = f"images/s of steps: {', '.join(speeds)}; ratios within rounds: {', '.join(ratios)}"
    text = "; ".join([text, *missing])
    failed = any(why.startswith("failed") for why in found["not_there"].values())
    return (FAULT if failed else MEASURED), text, call.out[call.out.index("| row") :].strip()


def check_paper(site: Site) -> Found:
    """Two epochs of scripts/paper_run.py, and what they say of its fifty."""
    images, source = site.folder / "many_classes", site.digits()
    for side in ("train", "test"):
        (images / side).mkdir(parents=True, exist_ok=True)
        for number in range(CLASSES[site.device]):
            (images / side / f"{number:02d}").symlink_to(source / side / str(number % 10))
    flags = f"--device {site.device} --cache_dir {site.folder / 'cache'}"
    flags += " --compile on" if site.gpu else " --compile off --image_size 8 --num_tasks 2"
    job, script = site.folder / "paper", "scripts/paper_run.py"
    site.call(sys.executable, script, "--images", images, "--job_dir", job, "--num_epochs", 2, f"--flags={flags}")
    return MEASURED, extrapolated(site.results("paper/run"), site.gpu)


def extrapolated(results: dict[str, Any], whole: bool) -> str:
    """From two epochs a task to EPOCHS: the images of an epoch at the run's speed, and the rest as it was."""
    share = results["time_share"]
    images = sum(task["train_images"] + task["replay_images"] for task in results["tasks"])
    rest = share["startup_seconds"] + share["compile_seconds"]
    rest += sum(results["seconds_by_part"].get(part, 0) for part in ("method", "evaluation"))
    seconds = EPOCHS * images / results["images_per_second"] + rest
    what = "CIFAR-100's size" if whole else "a small trial, not the paper's size"
    return (
        f"ours, 4 bits, {what}, {len(results['tasks'])} tasks: 2 epochs a task took {results['seconds']:.0f} s, so {EPOCHS} take "
        f"about {duration(seconds)}: {EPOCHS} x {images:,} images at {results['images_per_second']:,.0f} images/s, and "
        f"{rest:.0f} s for start-up, compilation, importances and evaluation. Assumed: later epochs are as fast as these"
    )


CHECKS: Sequence[tuple[str, Callable[[Site], Found]]] = (
    ("machine", check_machine),
    ("compiled step", check_compiled),
    ("tests that need a GPU", check_tests),
    ("methods", check_methods),
    ("kill and resume", check_resume),
    ("deterministic twice", check_deterministic),
    ("not deterministic twice", check_same_losses),
    ("bfloat16", check_bf16),
    ("memory of a step", check_memory),
    ("speed", check_speed),
    ("time of the paper's run", check_paper),
    ("methods, compiled", check_methods_compiled),
)
