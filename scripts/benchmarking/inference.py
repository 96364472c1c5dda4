"""Images/s of inference: the network in float and as the files of ``lifequant export``, on the CPU.

python scripts/benchmark.py --inference --out docs/export_speed.md --json docs/export_speed.json --picture docs/export_speed.png

Rows, chosen by --rows; all take the same bytes and normalize them, and float_onnx, which ratios divide by, is always there:
  float_eager, float_compiled   the network in float, in torch; compiled once for each batch size and number of threads,
                                with its weights as constants (freezing)
  float_onnx                    the same network, written by the same exporter, in onnxruntime
  fast, exact, int4             the network at 4 bits, 8 in the first and last layer: --integer fast, --integer exact, and
                                --integer exact --weights int4
Weights are random, scales and BatchNorm's statistics are those of random images. Every batch size is measured with one thread
and with all cores. All contenders are in one process and take turns, a round after another, each round beginning with
another one; a turn has one pass that is not timed, after a pause in which the threads of the former contender go to sleep.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path += [str(Path(__file__).resolve().parents[n]) for n in (1, 2)]  # this folder, and a clone not installed

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarking import report
from lifequant import options
from lifequant.common.errors import UserError
from lifequant.data.augment import normalize
from lifequant.exporting import run
from lifequant.models.build import build
from lifequant.qat.calibration import calibrate_network
from lifequant.runtime.device import wants_compile
from lifequant.runtime.onnx_session import session

BASE = "float_onnx"
FORMS = {BASE: ("exact", "int8"), "fast": ("fast", "int8"), "exact": ("exact", "int8"), "int4": ("exact", "int4")}
ROWS = ("float_eager", "float_compiled", *FORMS)
BATCHES = (1, 32, 128)
CLASSES = 10
CALIBRATION = 128  # images
USUAL = {"rows": ",".join(ROWS), "rounds": 9, "turn": 0.5}
QUICK = {"rows": "float_onnx,fast", "rounds": 2, "turn": 0.02}  # turn: seconds at least
PAUSE = 0.02  # seconds; a thread that has no work spins for some milliseconds before it sleeps
CLOSE = 1e-3  # logits of a float network, computed by torch and by onnxruntime

Pass = Callable[[], object]
Case = tuple[int, int]  # threads, batch


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def random_images(count: int) -> Tensor:
    """uint8 [count, 3, 32, 32], the same at every call."""
    return torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def network(name: str, bits: int) -> nn.Module:
    """A network with random weights, as after training: scales and BatchNorm's statistics are those of random images."""
    model = build(options.make(target_model=name, bitW=bits), CLASSES)
    images = normalize(random_images(CALIBRATION))
    calibrate_network(model, images)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0  # this batch's statistics alone
    model.train()(images)
    return model.eval()


def write_file(model: nn.Module, form: str, weights: str) -> bytes:
    """What ``lifequant export`` writes for a trained network."""
    from lifequant.exporting.onnx_file import make_onnx

    images = random_images(CALIBRATION)
    return make_onnx(model, images[:2], form, weights, [images.numpy()], {}, from_bytes=True).content


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def torch_pass(model: nn.Module, case: Case, compiled: bool) -> Pass:
    """A function that predicts a batch. It is compiled here and now, with the threads that it will run with."""
    images = random_images(case[1])
    if compiled:
        model = torch.compile(copy.deepcopy(model), dynamic=False, options={"freezing": True})

    def predict() -> Tensor:
        with torch.inference_mode():
            return model(normalize(images))

    with torch_threads(case[0]):
        predict()
    return predict


def onnx_pass(running: Any, batch: int) -> Pass:
    images = random_images(batch).numpy()
    return lambda: running.run(None, {"images": images})[0]


def build_all(rows: Sequence[str], name: str, cases: Sequence[Case]) -> tuple[dict, dict, dict]:
    """({row: {case: its pass}}, {row: facts of its file}, {row: why it isn't there})."""
    passes: dict[str, dict[Case, Pass]] = {}
    files, missing = {}, {}
    models = {bits: network(name, bits) for bits in (32, 4)}
    for row in tqdm(rows, "contenders", disable=None):
        if row in FORMS:
            content = write_file(models[32 if row == BASE else 4], *FORMS[row])
            whole, in_float = run.convolutions(run.kernels(content))
            files[row] = {"bytes": len(content), "integer_convolutions": whole, "float_convolutions": in_float}
            sessions = {threads: session(content, threads) for threads, _ in cases}
            passes[row] = {case: onnx_pass(sessions[case[0]], case[1]) for case in cases}
        elif row == "float_compiled" and not wants_compile(
            options.make(), torch.device("cpu"), 10**9, lambda text: None
        ):
            missing[row] = "no C++ compiler here"
        else:
            passes[row] = {case: torch_pass(models[32], case, row == "float_compiled") for case in cases}
    refuse_other_network(models[32], passes[BASE][cases[0]]())
    return passes, files, missing


@torch.inference_mode()
def refuse_other_network(model: nn.Module, logits: np.ndarray) -> None:
    """Raises RuntimeError where float_onnx computes something else than torch: its time would not count."""
    difference = float((model(normalize(random_images(len(logits)))) - torch.from_numpy(logits)).abs().max())
    if not difference < CLOSE:
        raise RuntimeError(f"the logits of torch and onnxruntime differ by {difference:.2g}")


def speed(predict: Pass, case: Case, seconds: float) -> float:
    """Images/s of a turn, which has one pass at least and takes ``seconds`` at least."""
    with torch_threads(case[0]):
        time.sleep(PAUSE)
        predict()
        passes, now = 0, (begin := time.perf_counter())
        while not passes or now - begin < seconds:
            predict()
            passes, now = passes + 1, time.perf_counter()
    return passes * case[1] / (now - begin)


def measure(passes: dict[str, dict[Case, Pass]], cases: Sequence[Case], rounds: int, seconds: float) -> dict:
    """{case: {row: images/s of each round}}"""
    found: dict[Case, dict[str, list[float]]] = {case: {row: [] for row in passes} for case in cases}
    rows = list(passes)
    for round in tqdm(range(rounds), "rounds", disable=None):
        shift = round % len(rows)
        for case in cases:
            for row in rows[shift:] + rows[:shift]:
                found[case][row].append(speed(passes[row][case], case, seconds))
    return found


def summary(speeds: dict, files: dict, missing: dict, machine: dict, settings: dict) -> dict[str, Any]:
    """What --json writes. Ratios are of images/s, to float_onnx, within rounds: [median, least, largest]."""
    cases = []
    for (threads, batch), rows in speeds.items():
        ratios = {
            row: report.spread([a / b for a, b in zip(values, rows[BASE], strict=True)]) for row, values in rows.items()
        }
        cases.append(
            {
                "threads": threads,
                "batch": batch,
                "images_per_second": {row: statistics.median(values) for row, values in rows.items()},
                "spread": {row: [min(values), max(values)] for row, values in rows.items()},
                "ratios": ratios,
                "rounds": rows,
            }
        )
    return {"cases": cases, "files": files, "not_there": missing, "settings": settings, "machine": machine}


def threads_said(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


def markdown(found: dict[str, Any]) -> str:
    """The tables as Markdown: the files, and the speeds with each number of threads."""
    lines = ["# Inference: images/s", "", report.heading(found["machine"], found["settings"]), ""]
    lines += ["| file | bytes | convolutions in integers | in float |", "|---|---:|---:|---:|"]
    for row, file in found["files"].items():
        lines.append(f"| {row} | {file['bytes']} | {file['integer_convolutions']} | {file['float_convolutions']} |")
    lines += ["", f"Median images/s, and their ratio to {BASE}'s within rounds: median (least .. largest)."]
    for threads in dict.fromkeys(case["threads"] for case in found["cases"]):
        cases = [case for case in found["cases"] if case["threads"] == threads]
        heads = [f"batch {case['batch']}: images/s | ratio" for case in cases]
        lines += ["", f"## {threads_said(threads)}", "", f"| row | {' | '.join(heads)} |"]
        lines.append("|---" + "|---:" * 2 * len(cases) + "|")
        for row in cases[0]["ratios"]:
            ratios = ["{:.2f} ({:.2f} .. {:.2f})".format(*case["ratios"][row]) for case in cases]
            medians = [f"{case['images_per_second'][row]:.0f}" for case in cases]
            cells = [f"{median} | {ratio}" for median, ratio in zip(medians, ratios, strict=True)]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    if found["not_there"]:
        lines += ["", *(f"{row} is not there: {why}." for row, why in found["not_there"].items())]
    return "\n".join(lines) + "\n"


def picture(found: dict[str, Any], out: Path) -> None:
    """Bars of the ratios, grouped by batch size, one number of threads beside the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cases = found["cases"]
    threads = list(dict.fromkeys(case["threads"] for case in cases))
    rows = [row for row in ROWS if row in cases[0]["ratios"]]
    colors = dict(zip(ROWS, ("0.75", "0.55", "0.3", "tab:orange", "tab:blue", "tab:green"), strict=True))
    top = max(most for case in cases for _, _, most in case["ratios"].values())
    figure, axes = plt.subplots(
        1, len(threads), figsize=(5.6 * len(threads), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    width = 0.86 / len(rows)
    for axis, count in zip(axes[0], threads, strict=True):
        here = [case for case in cases if case["threads"] == count]
        for index, row in enumerate(rows):
            places = [group + (index - (len(rows) - 1) / 2) * width for group in range(len(here))]
            medians, least, most = zip(*(case["ratios"][row] for case in here), strict=True)
            errors = [
                [m - v for m, v in zip(medians, least, strict=True)],
                [v - m for m, v in zip(medians, most, strict=True)],
            ]
            axis.bar(
                places,
                medians,
                width,
                color=colors[row],
                label=row,
                yerr=errors,
                error_kw={"elinewidth": 1, "capsize": 2},
            )
            for place, median, high in zip(places, medians, most, strict=True):
                axis.text(place, high + 0.02 * top, f"{median:.2f}", ha="center", va="bottom", rotation=90, fontsize=8)
        axis.axhline(1, color="0.3", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(here)), [f"batch {case['batch']}" for case in here])
        axis.set_title(threads_said(count), fontsize=10)
        axis.set_ylim(0, 1.15 * top)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(
        f"images/s over those of {BASE}\nmedian of {found['settings']['rounds']} rounds, least .. largest"
    )
    figure.legend(
        *axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(rows), frameon=False, fontsize=9
    )
    versions = found["machine"]["versions"]
    figure.suptitle(
        f"Inference, {found['settings']['model']}, {found['machine']['processor']}, onnxruntime {versions['onnxruntime']}, "
        f"torch {versions['torch']}",
        fontsize=9,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    tqdm.write(f"wrote {out}")


def benchmark(rows: Sequence[str], args: Any) -> tuple[dict[str, Any], str]:
    """(the figures, the tables). Raises UserError where onnxruntime or another package of the export is missing."""
    if args.device == "cuda":
        raise UserError("--inference: it is measured on the CPU: leave --device out")
    run.needed("onnx", "onnxruntime", "onnxscript", "torch")
    import onnxruntime

    args.device = "cpu"  # as the table says
    usual = QUICK if args.quick else USUAL
    cases = [(threads, batch) for threads in dict.fromkeys((1, cores())) for batch in BATCHES]
    passes, files, missing = build_all([row for row in ROWS if row in {*rows, BASE}], args.model, cases)
    machine = report.machine(args)
    machine["threads"] = " and ".join(str(count) for count in dict.fromkeys((1, cores())))
    machine["versions"]["onnxruntime"] = onnxruntime.__version__
    speeds = measure(passes, cases, args.rounds, usual["turn"])
    settings = {"model": args.model, "rounds": args.rounds, "seconds of a turn": usual["turn"]}
    found = summary(speeds, files, missing, machine, settings)
    return found, markdown(found)
