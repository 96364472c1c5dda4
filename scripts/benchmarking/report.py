"""What scripts/benchmark.py says: the machine, medians with their spread, ratios within rounds, a table, a picture."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import lifequant
from lifequant import options
from lifequant.common.errors import UserError
from lifequant.results.versions import commit
from lifequant.runtime.device import pick_device

BASES = ("float_compiled", "float_eager")  # what the table's last column divides by: the first that is there
PEERS = ("brevitas", "torch_qat", "published_scheme")
SUFFIXES = (".png", ".svg", ".pdf")


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(args: Any) -> dict[str, Any]:
    """Where and with what it was measured. The load is that of the minute before, the contenders' own start included."""
    device = pick_device(options.make(device=args.device))
    versions = {
        "lifequant": lifequant.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for package in ("brevitas", "torchvision"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
        "versions": versions,
        "commit": commit(),
    }


def spread(values: Sequence[float]) -> list[float]:
    """[median, least, largest]"""
    return [statistics.median(values), min(values), max(values)]


def pairs(rows: Sequence[str]) -> list[tuple[str, str]]:
    """What is divided by what: compiled by eager, every row by float, ours by its peers."""
    base = next((row for row in BASES if row in rows), None)
    found = [(row, base) for row in rows if base and row != base]
    found += [(row, eager) for row in rows if (eager := row.removesuffix("_compiled") + "_eager") in rows]
    found += [(ours, peer) for ours in ("ours_compiled", "ours_eager") for peer in PEERS]
    if {"ours_compiled", "float_compiled"} <= set(rows):
        found.append(("float_compiled", "ours_compiled"))
    return [(above, below) for above, below in dict.fromkeys(found) if {above, below} <= set(rows) and above != below]


def summary(speeds: dict[str, list[float]], problems: dict[str, str], ready: dict, machine: dict, args: Any) -> dict:
    """What --json writes."""
    ratios = {
        f"{above} / {below}": spread([a / b for a, b in zip(speeds[above], speeds[below], strict=True)])
        for above, below in pairs(list(speeds))
    }
    return {
        "images_per_second": {row: statistics.median(values) for row, values in speeds.items()},
        "spread": {row: [min(values), max(values)] for row, values in speeds.items()},
        "ratios": ratios,  # of images/s: [median, least, largest]
        "rounds": speeds,
        "not_there": problems,
        "seconds_to_start": ready,
        "settings": {name: getattr(args, name) for name in ("model", "batch", "rounds", "steps", "device")},
        "machine": machine,
    }


def heading(machine: dict[str, Any], settings: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    lines = "\n".join(
        [
            f"- {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, {machine['system']}, "
            f"device {machine['device']}, load {machine['load']}",
            f"- {versions}, commit {machine['commit']}",
            f"- {', '.join(f'{name} {value}' for name, value in settings.items())}",
        ]
    )
    return lines.removesuffix("\n- ")


def markdown(found: dict[str, Any]) -> str:
    """The table as Markdown, the fastest row first, and the ratios."""
    speeds, ratios = found["images_per_second"], found["ratios"]
    base = next((row for row in BASES if row in speeds), None)
    lines = ["# Training steps: images/s", "", heading(found["machine"], found["settings"]), ""]
    lines += [
        f"| row | images/s (median) | least .. largest | of {base or 'float'}, within rounds | seconds to start |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in sorted(speeds, key=speeds.get, reverse=True):
        least, most = found["spread"][row]
        share = ratios.get(f"{row} / {base}")
        beside = "1" if row == base else "-" if share is None else "{:.3f} ({:.3f} .. {:.3f})".format(*share)
        lines.append(
            f"| {row} | {speeds[row]:.1f} | {least:.1f} .. {most:.1f} | {beside} | {found['seconds_to_start'][row]:.0f} |"
        )
    lines += [f"| {row} | - | {why.replace('|', '/')} | - | - |" for row, why in found["not_there"].items()]
    other = {name: values for name, values in ratios.items() if not name.endswith(f"/ {base}")}
    if other:
        lines += ["", "| ratio of images/s, within rounds | median | least .. largest |", "|---|---:|---:|"]
        lines += [f"| {name} | {v[0]:.3f} | {v[1]:.3f} .. {v[2]:.3f} |" for name, v in other.items()]
    return "\n".join(lines) + "\n"


def check_picture(out: Path) -> None:
    """Before anything is measured. Raises UserError."""
    if out.suffix not in SUFFIXES:
        raise UserError(f"--picture {out}: give a name that ends in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--picture: matplotlib is missing: pip install lifequant[plot]") from None


def picture(found: dict[str, Any], out: Path) -> None:
    """A bar a row, from least to largest a line, the figures beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    speeds = found["images_per_second"]
    rows = sorted(speeds, key=speeds.get)
    color = {"float": "0.55", "ours": "tab:orange", **dict.fromkeys(("brevitas", "torch", "published"), "tab:red")}
    medians = [speeds[row] for row in rows]
    errors = [
        [m - found["spread"][row][0] for m, row in zip(medians, rows, strict=True)],
        [found["spread"][row][1] - m for m, row in zip(medians, rows, strict=True)],
    ]
    figure, axis = plt.subplots(figsize=(7.5, 1.3 + 0.3 * len(rows)), layout="constrained")
    colors = [color.get(row.split("_")[0], "tab:blue") for row in rows]
    axis.barh(rows, medians, color=colors, xerr=errors, error_kw={"elinewidth": 1.2, "capsize": 3})
    for index, row in enumerate(rows):
        axis.text(found["spread"][row][1], index, f"  {speeds[row]:.0f}", va="center", fontsize=9)
    machine, settings = found["machine"], found["settings"]
    axis.set_title(
        f"Training steps, {settings['model']}, batch {settings['batch']}\n{machine['processor']}, {machine['device']}, "
        f"{machine['threads']} threads, torch {machine['versions']['torch']}",
        fontsize=9,
    )
    axis.set_xlabel(f"images/s: median of {settings['rounds']} rounds, least .. largest")
    axis.set_xlim(0, 1.12 * max(most for _, most in found["spread"].values()))
    axis.margins(y=0.01)
    axis.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
    plt.close(figure)
    tqdm.write(f"wrote {out}")
