"""One command for a machine with a CUDA GPU: does LifeQuant work there, and how fast? Writes a report, a verdict a line.

bash scripts/gpu_check.sh --out gpu_check.md                # at most ten minutes
bash scripts/gpu_check.sh --device cpu --out gpu_check.md   # the same in small, to try it out without a GPU

Checked are the machine, the compiled step (graph breaks, CUDA graphs), the tests that need a GPU, every method, resuming after
SIGKILL, determinism, bfloat16; measured are memory, images/s beside other libraries', and the time of the paper's run. Each
check is a process of its own, and the report is written after each. Nothing is downloaded. Exit code 1 if anything is at fault.
"""

from __future__ import annotations

import datetime
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

import torch
from benchmarking.report import processor
from gpu_checking import report
from gpu_checking.checks import CHECKS, Found
from gpu_checking.site import Failed, Site, TimeUp

import lifequant
from lifequant.common.arguments import Parser, real, run_main
from lifequant.common.errors import UserError
from lifequant.common.files import write_all
from lifequant.results.versions import commit


def heading(argv: Sequence[str], args, site: Site) -> list[str]:
    """What was checked, where, when and how."""
    found = site.machine
    gpu = (
        found.get("gpu", "not known")
        if args.device == "cuda"
        else "none (--device cpu: small sizes, no figure is the GPU's)"
    )
    now = datetime.datetime.now().astimezone()
    return [
        f"date: {now:%Y-%m-%d %H:%M %z}",
        f"GPU: {gpu}",
        f"machine: {processor()}, {os.cpu_count()} cores",
        f"versions: lifequant {lifequant.__version__} (commit {commit()}), torch {torch.__version__}, "
        f"Python {sys.version.split()[0]}",
        f"command: `{shlex.join(['bash', 'scripts/gpu_check.sh', *argv])}`",
    ]


def run_check(name: str, check: Callable[[Site], Found], site: Site) -> report.Row:
    """The check's row, whatever happens in it."""
    site.calls = []
    began = time.monotonic()
    more = ""
    try:
        verdict, text, *rest = check(site)
        more = "".join(rest)
    except TimeUp as up:
        verdict, text = report.SKIPPED, str(up)
    except Failed as failed:
        verdict, text = report.FAULT, str(failed)
    except Exception as error:
        verdict, text = report.FAULT, f"the check itself failed: {type(error).__name__}: {error}"
    return report.Row(name, verdict, text, time.monotonic() - began, site.calls, more)


def run_checks(site: Site, argv: Sequence[str], args) -> list[report.Row]:
    """All rows; the report is written before the first and after each."""
    rows: list[report.Row] = []

    def write() -> None:
        still = [name for name, _ in CHECKS[len(rows) :]]
        names = {str(site.folder): "work", sys.executable: "python"}
        write_all({args.out: report.markdown(heading(argv, args, site), rows, still, names)})

    write()
    for name, check in CHECKS:
        print(f"{len(rows) + 1} of {len(CHECKS)}: {name} ({max(site.left(), 0):.0f} s left)", flush=True)
        rows.append(run_check(name, check, site))
        write()
    return rows


def main(argv: Sequence[str]) -> int:
    first, rest = __doc__.split("\n", 1)
    parser = Parser(prog="gpu_check.py", description=first, epilog=rest.split("\n\n")[-1])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu tries the checks out, in small")
    parser.add_argument("--minutes", type=real(above=0), default=10.0, help="checks that come later are left out")
    parser.add_argument("--out", type=Path, default=Path("gpu_check.md"), help="the report")
    args = parser.parse_args(argv)
    if args.out.is_dir():
        raise UserError(
            f"--out {args.out}: this is a folder: give the name of a file, like {args.out / 'gpu_check.md'}"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        why = "" if torch.version.cuda else f" (torch {torch.__version__} is built without CUDA)"
        raise UserError(f"torch finds no CUDA GPU here{why}: --device cpu tries the same checks in small, on the CPU")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # no command outlives this one
    folder = Path(tempfile.mkdtemp(prefix="lifequant-gpu-check-"))
    site = Site(folder, args.device, time.monotonic() + 60 * args.minutes)
    kept = False
    try:
        rows = run_checks(site, argv, args)
        kept = any(row.verdict == report.FAULT for row in rows)
    finally:
        if not kept:
            shutil.rmtree(folder, ignore_errors=True)
    print("\n".join(["", *report.table(rows), "", f"the report: {args.out.resolve()}"]))
    if kept:
        print(f"the runs' files: {folder}")
    return int(kept)


if __name__ == "__main__":
    sys.exit(run_main(main))
