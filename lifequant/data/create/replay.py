"""Replay CSVs: of each task's training images a sample to be kept, the same share of every class.

The choice is split.lowest's with the purpose "replay", as a training run makes it itself at the same seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lifequant.common.arguments import Parser, int_at_least, share
from lifequant.common.commands import command
from lifequant.common.errors import one_line
from lifequant.common.files import find_folder, write_all
from lifequant.common.text import say
from lifequant.data import dataset_json
from lifequant.data.create.tasks import remove_stale
from lifequant.data.split import lowest, share_of_each
from lifequant.data.task_csv import Rows, choose_prefix, choose_tasks, csv_name, csv_text, read_rows


def main_replay(argv: Sequence[str]) -> int:
    """replayDataGenerator.py: writes ``<prefix>_replay0.csv``, ... beside the training CSVs. Raises UserError."""
    parser = Parser(description="Sample the replay images of each task.")
    parser.add_argument("--data_dir", default=".", help="folder that has the task CSVs")
    parser.add_argument("--data_csv", "--output_csv", metavar="NAME.csv", help="the data set, where there are several")
    parser.add_argument("--num_tasks", type=int_at_least(1), help="tasks to sample (default: all)")
    parser.add_argument("--replay_rate", type=share, default=0.2, help="share of the images kept: 20 or 0.2")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="seed of the choice among images")
    args = parser.parse_args(argv)

    folder = find_folder(args.data_dir, "--data_dir", f"give the folder that this wrote: {command('tasks')}")
    prefix = choose_prefix(folder, args.data_csv)
    num_tasks = choose_tasks(folder, prefix, args.num_tasks)
    print(f"task CSVs: {one_line(folder / prefix)}_train0.csv to {num_tasks - 1}")
    print(f"--replay_rate: {100 * args.replay_rate:g} % of each class, at least one image")
    train = [read_rows(folder / csv_name(prefix, "train", task)) for task in range(num_tasks)]
    replay = [replay_rows(rows, args.replay_rate, args.seed) for rows in train]

    files = {folder / csv_name(prefix, "replay", task): csv_text(rows) for task, rows in enumerate(replay)}
    names = ", ".join(path.name for path in files)
    record = dataset_json.read(folder)
    if record is not None and record.get("name") == prefix:
        record["counts"]["replay"] = [len(rows) for rows in replay]
        files[folder / dataset_json.FILE] = dataset_json.text(record)
    write_all(files)
    for note in remove_stale(folder, prefix, "replay", num_tasks):
        say(f"note: {note}")
    for task, (kept, rows) in enumerate(zip(replay, train, strict=True)):
        print(f"task {task}: {len(kept)} of {len(rows)} training images stored")
    say(f"wrote {one_line(names)}")
    return 0


def replay_rows(rows: Rows, rate: float, seed: int) -> Rows:
    """The share ``rate`` of each class's images, in the order of ``rows``."""
    paths, labels = [image for image, _ in rows], [label for _, label in rows]
    keep = share_of_each(Counter(labels), rate)
    return [rows[index] for index in lowest(paths, labels, keep, seed, "replay")]
