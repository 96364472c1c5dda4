"""Write resnet-20-cifar-10/data/: CIFAR-10 in 3 tasks, 25 % of the classes replaced, seed 0.

What lifeLongDataGeneator.py writes for the folder that prepare_images.py makes of the full CIFAR-10; it reads names
only, and these are known without the images. The image root, which is another on every machine, is left open (null).
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

from lifequant.common.files import write_all
from lifequant.data import dataset_json
from lifequant.data.create.tasks import checked_tasks, csv_files, rows_of_tasks

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]  # torchvision's


def shipped(train: int = 5000, test: int = 1000) -> dict[str, str]:
    """Name and content of each file, for so many training and test images a class."""
    tasks = checked_tasks(len(CLASSES), num_tasks=3, rate=0.25, seed=0)
    record = dataset_json.record("cifar10", CLASSES, tasks, root=None, seed=0, rate=0.25)
    files = {}
    for source, count in (("train", train), ("test", test)):
        names = [(name, label, n) for label, name in enumerate(CLASSES) for n in range(1, count + 1)]
        task_rows = rows_of_tasks([(f"{source}/{name}/{n:04d}.png", label) for name, label, n in names], tasks)
        files |= csv_files("cifar10", source, task_rows)
        record["counts"][source] = [len(rows) for rows in task_rows]
    return {**files, dataset_json.FILE: dataset_json.text(record)}


if __name__ == "__main__":
    out = Path(__file__).resolve().parents[1] / "resnet-20-cifar-10" / "data"
    write_all({out / name: content for name, content in shipped().items()})
