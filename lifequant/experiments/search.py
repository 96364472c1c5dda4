"""Find settings on training images that are held out; no test image is read.

    lifequant search resnet-20-cifar-10/experiments/search_tuned_4bit.toml --data_dir data_dir/cifar100 --out experiment/search --jobs 2

The grid is that of a sweep, with held_out in [tasks], and one of two things in place of [rows]:

    [strength.ewc]               # a method and the values of its one flag: which is best
    ll_lambda = [1, 10, 100]

    [start]                      # flags that a search over parts begins from
    method = "replay"
    [parts.distillation]         # a part: flags, or several of them to choose from
    distill = [0.5, 1]

Parts are chosen one after another. Each round tries every part that is left, on top of those chosen, and takes the best one if
it gains at least --gain points. A part that loses more than --gain in a round is not tried again. A round costs as many runs
as there are parts, so the whole search costs far less than the grid of all combinations. No sampler decides, so the search can
be repeated exactly. (Optuna's samplers need more runs than this before they know more.)

The score is the average accuracy on the held-out images, as a mean over seeds. Where tasks share no class and a method has no
replay, that average is the last task's alone, so the score is the task-masked accuracy.
--write writes what was found and all that was tried into a JSON file: a table of strengths, or a preset's ``by_bits``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from lifequant.common.arguments import Parser, int_at_least, real, share
from lifequant.common.errors import UserError
from lifequant.common.files import write_all
from lifequant.common.text import duration
from lifequant.experiments import result_files
from lifequant.experiments.executor import Local
from lifequant.experiments.grid import read_grid, runs_of_grid
from lifequant.experiments.sweep import Sweep


class Search:
    """Runs rows of a grid and scores them."""

    def __init__(self, path: Path, data_dir: Path, out: Path, jobs: int, have: dict[str, dict[str, Any]]) -> None:
        self.path, self.data_dir, self.out, self.jobs, self.have = path, data_dir, out, jobs, have
        self.grid = read_grid(path, rows=False)
        if not self.grid["tasks"].get("held_out"):
            raise UserError(f"{path}: [tasks] needs held_out: a search does not read test images")
        self.seconds = 0.0

    def scores(self, rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """{row: its flags and scores} of rows without lists; those that diverged have no score."""
        grid = {**self.grid, "rows": rows}
        runs = runs_of_grid(grid, self.out, str(self.path), self.have)
        sweep = Sweep(runs, self.data_dir, self.out, self.out / self.path.stem, Local(self.jobs), self.have)
        sweep.go()
        self.seconds += sum(sweep.times.values())
        found = {}
        for row, flags in rows.items():
            mine = [run for run in runs if run.name.startswith(f"{row}/seed")]
            rate = self.grid["tasks"].get("diminish_rate")  # domains have none
            disjoint = rate is not None and share(str(rate)) == 1
            scored = scored_by([sweep.results(run) for run in mine], disjoint) if all(map(sweep.finished, mine)) else {}
            found[row] = {"flags": flags, **scored}
            print(f"{row}: {found[row].get('score', 'diverged')}", flush=True)
        return found


def scored_by(results: list[dict[str, Any]], disjoint: bool) -> dict[str, Any]:
    """Means over seeds, in percent. ``score`` decides."""
    values = {
        "average_accuracy": mean(r["average_accuracy"] for r in results),
        "task_masked": mean(mean(r["top1_masked"][-1]) for r in results),
        "forgetting": mean(r["forgetting"] for r in results),
    }
    replay = any(r["memory_bytes"]["replay"] for r in results)
    values["score"] = values["task_masked" if disjoint and not replay else "average_accuracy"]
    return {name: round(value, 2) for name, value in values.items()} | {"replay": replay, "seeds": len(results)}


def options_of(flags: dict[str, Any]) -> list[dict[str, Any]]:
    """The alternatives of a part: one of its flags may be a list. Raises UserError for two lists."""
    lists = [name for name, value in flags.items() if isinstance(value, list)]
    if len(lists) > 1:
        raise UserError(f"{lists[0]} and {lists[1]} are both lists: one flag of a part may be")
    return [{**flags, lists[0]: value} for value in flags[lists[0]]] if lists else [flags]


def named(part: str, flags: dict[str, Any]) -> str:
    return part + " " + " ".join(f"{name}={value}" for name, value in flags.items())


def strengths(search: Search) -> dict[str, Any]:
    """The best value of each method's flag."""
    rows = {}
    for method, flags in search.grid["strength"].items():
        for choice in options_of(flags):
            rows[named(method, choice)] = {"method": method, **choice}
    found = search.scores(rows)
    tried, chosen = [], {}
    for row in found.values():
        method = row["flags"]["method"]
        (flag, value), *_ = [item for item in row.pop("flags").items() if item[0] != "method"]
        tried.append({"method": method, "flag": flag, "value": value, **row})
    for method in search.grid["strength"]:
        scored = [row for row in tried if row["method"] == method and "score" in row]
        chosen[method] = max(scored, key=lambda row: row["score"])["value"] if scored else None
    return {"chosen": chosen, "tried": tried}


def parts(search: Search, gain: float, rounds: int) -> dict[str, Any]:
    """Choose parts, one after another, as long as one gains."""
    left = {part: options_of(flags) for part, flags in search.grid["parts"].items()}
    chosen = dict(search.grid["start"])
    best = search.scores({"start": chosen})["start"]
    tried = [{"round": 0, "part": "start", **best}]
    for number in range(1, rounds + 1):
        rows = {
            f"{number} {named(p, o)}": (p, o)
            for p, choices in left.items()
            for o in choices
            if {**chosen, **o} != chosen
        }
        so_far = f"{number} so far"  # has finished: what has its task 0 begins with it
        trials = {so_far: chosen, **{name: {**chosen, **own} for name, (_, own) in rows.items()}}
        found = search.scores(trials) if rows else {}
        found.pop(so_far, None)
        tried += [{"round": number, "part": name, **row} for name, row in found.items()]
        scored = {name: row["score"] for name, row in found.items() if "score" in row}
        name = max(scored, key=scored.get, default=None)
        if name is None or scored[name] < best["score"] + gain:
            break
        lost = [own for other, (_, own) in rows.items() if scored.get(other, 0) < best["score"] - gain]
        chosen, best, taken = found[name]["flags"], found[name], rows[name][0]
        left = {p: [o for o in choices if o not in lost] for p, choices in left.items() if p != taken}
    return {"settings": chosen, "score": best["score"], "tried": tried}


def main(argv: Sequence[str]) -> int:
    parser = Parser(description="Find settings on held-out training images.")
    parser.add_argument("grid", help="TOML, as search.py says")
    parser.add_argument("--data_dir", required=True, help="folder with train/<class>/*")
    parser.add_argument("--out", required=True, help="folder of the runs; those that are finished are not run again")
    parser.add_argument("--jobs", type=int_at_least(1), default=1, help="runs at a time")
    parser.add_argument(
        "--have", nargs="+", default=[], metavar="FOLDER", help="results of runs that are not to run again"
    )
    parser.add_argument("--gain", type=real(0), default=0.5, help="points that a part must gain")
    parser.add_argument("--rounds", type=int_at_least(1), default=4, help="parts to choose at most")
    parser.add_argument("--write", help="JSON file of what was found and of all that was tried")
    args = parser.parse_args(argv)
    search = Search(
        Path(args.grid),
        Path(args.data_dir).resolve(),
        Path(args.out).resolve(),
        args.jobs,
        result_files.shown_results(args.have),
    )
    found = strengths(search) if "strength" in search.grid else parts(search, args.gain, args.rounds)
    words = (Path(word).name if Path(word).is_absolute() else word for word in argv)
    record = {
        "command": "python scripts/search.py " + " ".join(words),
        "protocol": {name: search.grid.get(name, {}) for name in ("title", "tasks", "source", "flags")},
        **found,
    }
    text = json.dumps(record, indent=1) + "\n"
    if args.write:
        write_all({Path(args.write): text})
    print(text + f"{duration(search.seconds)} of runs in all")
    return 0
