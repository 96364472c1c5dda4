"""Tables and pictures from the results.json of many runs, averaged over seeds.

python scripts/report.py experiment/claim1 --out docs/claim1

Every results.json below the folders is read, and nothing else. A run's row is its folder as seen from the folder given,
without a last part seed<N>. Runs of a row are averaged where they differ in nothing but the seed, and refused otherwise.
Writes report.md, table.csv, table.tex (with --latex) and, where matplotlib is installed, pictures.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lifequant.common.arguments import Parser
from lifequant.common.errors import UserError, closest, one_line
from lifequant.common.text import wrapped
from lifequant.experiments import domains
from lifequant.experiments.pictures import draw
from lifequant.experiments.result_files import COMPACT, NEEDED, compact, results_below
from lifequant.experiments.rows import Run, errors_that_fell, group, shift_and_forgetting, tables
from lifequant.experiments.tables import LEGEND, code, csv_text, latex, markdown

NUMBERS = ("seed", "bitW", "abitW", "num_epochs", "train_batch_size", "image_size")
MORE = ("bwt", "quantization_error", "code_histograms", "versions")
RELATION = """\
Spearman's rank correlation of a run's mean space shift and its forgetting; interval: Fisher's z with Bonett and Wright's
standard error. Runs of a row are no independent samples, so the interval is the narrowest that may be believed."""


def label(path: Path, top: Path) -> str:
    """The row's name for the results.json at ``path``, which was found below ``top``."""
    parts = path.parent.relative_to(top).parts
    names = parts or path.resolve().parent.parts[-2:]  # the run's own folder was given
    kept = names[:-1] if re.fullmatch(r"seed\d+", names[-1]) else names
    return one_line("/".join(kept if parts else kept[-1:]) or top.resolve().name)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2**63


def _is_matrix(value: Any, columns: int) -> bool:
    return isinstance(value, list) and all(
        isinstance(row, list) and len(row) == columns and all(map(_is_number, row)) for row in value
    )


def _are_kept(task: dict[str, Any]) -> bool:
    """Whether what a domain task says of replay and importances is as a run writes it."""
    replay = task.get("replay_of_domains", {})
    return (
        isinstance(replay, dict) and all(map(_is_count, replay.values())) and _is_count(task.get("importance_bytes", 0))
    )


def _fault(found: dict[str, Any]) -> str | None:
    """The first entry that no run writes in this form, beyond what schema.check looks at; None if all are good."""
    config, tasks, size = found["config"], found["tasks"], len(found["tasks"])
    images = ("train_images", "replay_images", "test_images")
    good = {
        "config": _is_count(config.get("seed")) and all(_is_count(config.get(name)) for name in NUMBERS)
        and all(isinstance(config.get(name), str) for name in ("method", "quantizer"))
        and isinstance(config.get("dataset"), str | None),
        "tasks": tasks and all(isinstance(t.get("classes"), list) and all(_is_count(t.get(n)) for n in images) and _are_kept(t) for t in tasks),
        "top1": len(found["top1"]) in (1, size),
        "average_accuracy": found["average_accuracy"] is not None,
        "memory_bytes": {"packed_model", "replay"} <= found["memory_bytes"].keys(),
        "space_shift": isinstance(found["space_shift"], dict) and all(_is_matrix(m, size) or _is_matrix(m, 1) for m in found["space_shift"].values()),
        "quantization_error": _is_matrix(found["quantization_error"], size),
        "code_histograms": isinstance(found["code_histograms"], dict) and all(
            isinstance(h, dict) and type(h.get("first_code")) is int and isinstance(h.get("counts"), list) and all(map(_is_count, h["counts"]))
            for h in found["code_histograms"].values()),
        "versions": isinstance(found["versions"], dict),
        "grid_tasks": isinstance(found.get("grid_tasks"), dict | None),
    }  # fmt: skip
    return next((name for name, fine in good.items() if not fine), None)


def find(folders: Sequence[str], chosen: Sequence[str] | None) -> list[Run]:
    """The runs below the folders, in the order of their labels. Raises UserError."""
    found: dict[Path, tuple[str, Path, dict[str, Any]]] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        for path, results in results_below(folder, (*NEEDED, *MORE)):
            found.setdefault(path.resolve(), (label(path, folder), path, results))
    if not found:
        raise UserError(f"{', '.join(folders)}: no results.json below; a run writes it at its end")
    names = sorted({name for name, *_ in found.values()})
    for name in chosen or ():
        if not any(name == known or fnmatchcase(known, name) for known in names):
            raise UserError(f"--rows {name}: no such row{closest(name, names)} (rows: {', '.join(names)[:300]})")
    runs = []
    for name, path, results in sorted(found.values(), key=lambda entry: entry[:2]):
        if chosen and not any(name == one or fnmatchcase(name, one) for one in chosen):
            continue
        if fault := _fault(results):
            raise UserError(f"{path}: its {fault} is not as a run writes it: remove it, or leave its folder out")
        runs.append(Run(name, one_line(path), results))
    return runs


def main(argv: Sequence[str]) -> int:
    """Write the report. Raises UserError."""
    parser = Parser(description="Tables and pictures from the results.json of runs, over seeds.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="every results.json below it is read")
    parser.add_argument("--out", help="folder of what is written (default: the first FOLDER)")
    parser.add_argument("--latex", action="store_true", help="write the tables as LaTeX too")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows alone; * stands for anything")
    parser.add_argument("--no_pictures", action="store_true", help="write the tables alone")
    parser.add_argument(
        "--compact", action="store_true", help=f"write {COMPACT}, one run a line, for this report to read"
    )
    args = parser.parse_args(argv)
    rows = group(find(args.folders, args.rows))
    found = tables(rows)
    relation = [shift_and_forgetting("all rows", rows)]
    if len(found) > 1:
        relation += [shift_and_forgetting(table.bits, table.rows) for table in found]
    out = Path(args.out or args.folders[0])
    out.mkdir(parents=True, exist_ok=True)
    drawn = not args.no_pictures and find_spec("matplotlib") is not None
    if not drawn and not args.no_pictures:
        print("no pictures: matplotlib is missing (pip install lifequant[plot])")
    text = ["# Report", ""]
    for table in found:
        text += [markdown(table), *domains.markdown(table)]
        for name, caption in draw(table, found, out) if drawn else ():
            text += [f"![{name.removesuffix('.png')}]({name})", "", caption, ""]
            print(f"wrote {one_line(out / name)}")
    text += ["## Space shift and forgetting", "", RELATION, "", *(f"- {line}" for line in relation), ""]
    fell = [f"all rows: {errors_that_fell(rows)}", *(f"{code(row.label)}: {errors_that_fell([row])}" for row in rows)]
    said = "xi(s,T) / xi(s,s) of the former tasks of all runs. The paper proves at least 1."
    text += ["## Quantization error", "", said, "", *(f"- {line}" for line in fell), "", LEGEND, ""]
    print("Spearman's correlation of space shift and forgetting:")
    print(*(wrapped(f"  {line}") for line in relation), sep="\n")
    written = {"report.md": "\n".join(text), "table.csv": csv_text(found)}
    if args.latex:
        written["table.tex"] = "\n".join(map(latex, found))
    if args.compact:
        written[COMPACT] = compact(Path(args.folders[0]))
    for name, content in written.items():
        (out / name).write_text(content, encoding="utf-8", newline="\n")
        print(f"wrote {one_line(out / name)}")
    return 0
