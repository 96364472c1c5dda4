"""Task CSVs from a folder of images: which classes each task has, and which images.

``<data>/train/<class>/*`` and ``<data>/test/<class>/*`` become ``<prefix>_train.csv``, ``<prefix>_train0.csv``, ... and
dataset.json. With --domains, one folder a domain has the same classes, and task t is domain t. Only names are read (and
the beginning of files whose names tell nothing), never pixels. Classes are split as split.class_tasks says; the same seed gives train and test the same split.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lifequant.common.arguments import Parser, int_at_least, real, share
from lifequant.common.commands import command, prepare_command
from lifequant.common.errors import UserError, closest, one_line
from lifequant.common.files import checked_name, find_folder, write_all
from lifequant.common.text import say, some
from lifequant.data import dataset_json
from lifequant.data.create.class_folders import Seen, class_images, class_names, folders_in, refuse_shared
from lifequant.data.split import TEST_SHARE, class_tasks, long_tail, lowest, share_of_each
from lifequant.data.task_csv import Rows, csv_name, csv_text, task_numbers


def main_tasks(argv: Sequence[str]) -> int:
    """lifeLongDataGeneator.py: the CSVs of one source (train or test) and dataset.json. Raises UserError."""
    args = _arguments(argv)
    prefix = checked_prefix(args.output_csv)
    root = find_folder(args.data_dir, "--data_dir", f"make the images: {prepare_command(prefix, args.data_dir)}")
    print(f"images: {one_line(root)}")
    seen = Seen()
    if args.domains:
        names, pools = domain_images(root, args.domains, args.source, args.seed, seen)
        tasks = [list(range(len(names)))] * len(pools)
    else:
        names, pool = folder_images(root, root, args.source, seen)
        pools = [pool]
        tasks = checked_tasks(len(names), args.num_tasks, args.diminish_rate, args.seed)
        here = f" (here {len(set(tasks[0]) - set(tasks[1]))} of {len(tasks[0])})" if len(tasks) > 1 else ""
        say(f"--diminish_rate: {100 * args.diminish_rate:g} % of a task's classes are replaced from task to task{here}")
    pools = _thinned(pools, args)
    task_rows = pools if args.domains else rows_of_tasks(pools[0], tasks)

    suffix = "domains" if args.domains else f"{round(100 * args.diminish_rate):03d}"
    folder = Path(args.output_dir or f"{prefix}_{suffix}").expanduser()
    record = dataset_json.record(
        prefix, names, tasks, root, args.seed, None if args.domains else args.diminish_rate, args.domains
    )
    if args.source == "train":
        record |= {"lt_gamma": args.lt_gamma, "images_per_class": args.images_per_class}
    record["counts"] = {args.source: [len(rows) for rows in task_rows]}
    if seen.linked:
        record["linked"] = seen.outside()
    record = dataset_json.merged(folder, record, args.source)
    files = {folder / name: text for name, text in csv_files(prefix, args.source, task_rows).items()}
    write_all({**files, folder / dataset_json.FILE: dataset_json.text(record)})
    notes = seen.notes(root) + remove_stale(folder, prefix, args.source, len(tasks)) + outdated(folder, prefix, record)

    for task, (labels, rows) in enumerate(zip(tasks, task_rows, strict=True)):
        domain = f" ({args.domains[task]})" if args.domains else ""
        print(f"task {task}{domain}: {len(labels)} classes, {len(rows)} {args.source} images")
    say(f"wrote {one_line(folder)}: {', '.join(path.name for path in files)}, {dataset_json.FILE}")
    for note in notes:
        say(f"note: {note}")
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(description="Write the task CSVs of a folder of images.")
    parser.add_argument("--data_dir", required=True, help="folder that has train/<class>/* and test/<class>/*")
    parser.add_argument(
        "--output_csv", required=True, metavar="NAME.csv", help="the data set's name, first in all files"
    )
    parser.add_argument("--source", required=True, choices=("train", "test"), help="which of the two folders")
    parser.add_argument(
        "--num_tasks", type=int_at_least(1), help="number of tasks (with --domains: the number of domains)"
    )
    parser.add_argument("--diminish_rate", type=share, help="share of classes replaced between tasks: 25 or 0.25")
    parser.add_argument(
        "--seed", type=int_at_least(0), default=0, help="seed of the class order and of all choices among images"
    )
    parser.add_argument("--output_dir", help="folder for the CSVs (default: NAME_025 for a quarter, where you are)")
    parser.add_argument("--images_per_class", type=int_at_least(1), help="keep this many images of each class")
    parser.add_argument(
        "--lt_gamma",
        "--imbalance_ratio",
        type=real(least=1),
        default=1.0,
        help="long tail: size of the largest training class over the smallest",
    )
    parser.add_argument("--domains", help="domain tasks: folders of --data_dir, as webcam,dslr,amazon")
    args = parser.parse_args(argv)
    if args.domains is not None:
        args.domains = args.domains.split(",")
        if args.num_tasks not in (None, len(args.domains)):
            raise UserError(f"--num_tasks {args.num_tasks}: --domains names {len(args.domains)}, and each is one task")
        if args.diminish_rate is not None:
            say("note: --diminish_rate has no effect with --domains: all tasks have the same classes")
    elif args.num_tasks is None or args.diminish_rate is None:
        missing = "--num_tasks" if args.num_tasks is None else "--diminish_rate"
        raise UserError(
            f"{missing} is missing (for tasks of classes: --num_tasks 3 --diminish_rate 25; else --domains)"
        )
    return args


def checked_prefix(output_csv: str) -> str:
    """``cifar100`` for ``cifar100.csv``; raises UserError for what is no plain file name."""
    prefix = output_csv.removesuffix(".csv")
    if not prefix or prefix.startswith(".") or any(c in "/\\" or not c.isprintable() for c in prefix):
        raise UserError(
            f"--output_csv {output_csv!r}: give a plain name such as cifar100.csv; --output_dir is the folder"
        )
    return prefix


def checked_tasks(num_classes: int, num_tasks: int, rate: float, seed: int) -> list[list[int]]:
    """``class_tasks``; raises UserError where tasks would be empty or all alike."""
    if num_tasks > 1 and (num_tasks > num_classes or _stride(num_classes, num_tasks, rate) < 1):
        raise UserError(
            f"{num_classes} classes are too few for --num_tasks {num_tasks} at --diminish_rate {100 * rate:g} %: "
            "no class would be replaced from task to task; fewer tasks or a higher rate"
        )
    return class_tasks(num_classes, num_tasks, rate, seed)


def _stride(num_classes: int, num_tasks: int, rate: float) -> int:
    """Classes that task 1 no longer has (any seed gives the same number)."""
    first, second = class_tasks(num_classes, num_tasks, rate, seed=0)[:2]
    return len(set(first) - set(second))


def folder_images(root: Path, folder: Path, source: str, seen: Seen | None = None) -> tuple[list[str], Rows]:
    """Sorted class names, and the images of ``folder``/``source`` with paths relative to ``root``. Raises UserError.

    ``seen`` takes what else is there.
    """
    if not (folder / source).is_dir():
        raise UserError(f"{folder}: no folder {source}/; expected are {source}/<class>/* with images")
    names = {side: class_names(folder / side) for side in ("train", "test") if (folder / side).is_dir()}
    for name in sorted(set().union(*names.values())):
        for side in names:
            if name not in names[side]:
                raise UserError(f"{folder / side}: no class '{name}', which the other of train/ and test/ has")
    rows = class_images(root, folder / source, names[source], seen)
    for side in names.keys() - {source}:
        refuse_shared(root, rows, folder / side, names[side])
    return names[source], rows


def domain_images(root: Path, domains: list[str], source: str, seed: int, seen: Seen) -> tuple[list[str], list[Rows]]:
    """Sorted class names and each domain's images of ``source``; a domain without train/ is split 80:20, seeded."""
    present = folders_in(root)
    for domain in domains:
        if domain not in present or domains.count(domain) > 1:
            found = f"folders: {', '.join(present) or 'none'}{closest(domain, present)}"
            raise UserError(
                f"--domains: {domain!r} is " + ("there twice" if domain in present else f"not in {root} ({found})")
            )
    found = {}
    for domain in domains:
        folder = root / checked_name(domain, root)
        if (folder / "train").is_dir():
            found[domain] = folder_images(root, folder, source, seen)
        else:
            if (folder / "images").is_dir() and folders_in(folder / "images"):  # so Office-31 is distributed
                folder /= "images"
            names = class_names(folder)
            found[domain] = names, _own_split(class_images(root, folder, names, seen), names, source, seed, folder)
    names = sorted(set().union(*(have for have, _ in found.values())))
    for domain, (have, _) in found.items():
        if lacking := set(names) - set(have):
            other = next(other for other, (its, _) in found.items() if min(lacking) in its)
            raise UserError(
                f"{root / domain}: no class {some(lacking)}, which {other} has; all domains need the same classes"
            )
    return names, [rows for _, rows in found.values()]


def _own_split(rows: Rows, names: list[str], source: str, seed: int, folder: Path) -> Rows:
    paths, labels = [image for image, _ in rows], [label for _, label in rows]
    counts = Counter(labels)
    for label, n in counts.items():
        if n < 2:
            raise UserError(f"{folder / names[label]}: one image; a class needs two, for training and for testing")
    test = set(lowest(paths, labels, share_of_each(counts, TEST_SHARE), seed, "domain_test"))
    return [row for index, row in enumerate(rows) if (index in test) == (source == "test")]


def _thinned(pools: list[Rows], args: argparse.Namespace) -> list[Rows]:
    """--images_per_class (of each domain), then --lt_gamma, of training images only, over all of them."""
    if args.images_per_class:
        every = [Counter(label for _, label in rows) for rows in pools]
        few = sum(n < args.images_per_class for counts in every for n in counts.values())
        if few:
            say(f"note: {few} class folders have fewer than {args.images_per_class} images; all of these are kept")
        keep = [dict.fromkeys(counts, args.images_per_class) for counts in every]
        pools = [_kept(rows, most, args.seed, "thin") for rows, most in zip(pools, keep, strict=True)]
    if args.lt_gamma > 1 and args.source == "test":
        say("note: --lt_gamma thins training images only; the test images stay as they are")
    elif args.lt_gamma > 1:
        rows = [row for pool in pools for row in pool]
        counts = Counter(label for _, label in rows)
        kept = set(_kept(rows, long_tail(counts, len(counts), args.lt_gamma), args.seed, "long_tail"))
        pools = [[row for row in pool if row in kept] for pool in pools]
    return pools


def _kept(rows: Rows, keep: dict[int, int], seed: int, purpose: str) -> Rows:
    indices = lowest([image for image, _ in rows], [label for _, label in rows], keep, seed, purpose)
    return [rows[index] for index in indices]


def rows_of_tasks(rows: Rows, tasks: list[list[int]]) -> list[Rows]:
    """Each task's rows: the images of its classes."""
    return [[row for row in rows if row[1] in labels] for labels in map(set, tasks)]


def csv_files(prefix: str, source: str, task_rows: list[Rows]) -> dict[str, str]:
    """Name and content of the CSV over all tasks (each image once, by label and path) and of each task's."""
    every = sorted(set().union(*task_rows), key=lambda row: (row[1], row[0]))
    files = {csv_name(prefix, source): csv_text(every)}
    return files | {csv_name(prefix, source, task): csv_text(rows) for task, rows in enumerate(task_rows)}


def remove_stale(folder: Path, prefix: str, source: str, num_tasks: int) -> list[str]:
    """Remove the CSVs of a former run with more tasks, which training would take for tasks; returns a note on them."""
    stale = [csv_name(prefix, source, task) for task in task_numbers(folder, prefix, source) if task >= num_tasks]
    for name in stale:
        (folder / name).unlink()
    return [f"removed {', '.join(stale)}, left by a run with more tasks"] if stale else []


def outdated(folder: Path, prefix: str, record: dataset_json.Record) -> list[str]:
    """A note on each kind of CSV in ``folder`` that the record no longer answers for: its settings may be others."""
    remedy = {"train": "--source train", "test": "--source test", "replay": command("replay")}
    lost = [s for s in remedy if s not in record["counts"] and task_numbers(folder, prefix, s)]
    return [f"the {s} CSVs here may have been made with other settings: make them again ({remedy[s]})" for s in lost]
