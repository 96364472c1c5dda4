"""Hostile files: mutated task CSVs (with dataset.json) through the program's loader, mutated images through its decoder.

    python scripts/fuzz.py --csvs 20000 --images 2000 --seed 0 --out faults

Each input must load, or be refused by one printable line. Anything else is a fault, as is one that takes longer than
--seconds, or after which the process has held more than --gigabytes: the input is saved under --out, and the exit code
is 1. ``--atheris`` (pip install lifequant[fuzz]) lets the covered lines guide the mutations, for as many inputs in all;
--out is then its corpus too.
"""

from __future__ import annotations

import io
import json
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _mutations import mutated, mutated_csv, mutated_json
from PIL import Image

from lifequant import options
from lifequant.common.arguments import Parser, int_at_least, real, run_main
from lifequant.common.errors import UserError, one_line
from lifequant.data import dataset
from lifequant.data.decode import decode, quiet

SIDE = 8
LONGEST = 1000  # characters of a message
FILES = ("x_train0.csv", "x_train1.csv", "x_test0.csv", "x_test1.csv", "x_replay0.csv", "x_replay1.csv", "dataset.json")
FORMATS = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"),
    "TGA": ("RGB",),  # not admitted
    "EPS": ("RGB",),  # not admitted: would start a program
}


class TooLong(BaseException):
    """Not an Exception, so that no handler takes it for a broken file."""


class CsvTarget:
    """A valid folder of two tasks; one or two of its files are replaced, and all is loaded as a run loads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "csvs"
        self.folder.mkdir()
        root, rows = folder / "root", {"train": [], "test": []}
        for side, found in rows.items():
            for label, number in np.ndindex(3, 3):
                name = f"{side}/{label}/{number}.png"
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (SIDE, SIDE), (label, number, 0)).save(root / name)
                found.append(f"{name},{label}\n")
        (root / "loop").symlink_to("loop")
        (root / "out").symlink_to(folder)
        self.valid: dict[str, bytes] = {}
        for task in range(2):
            for side, kept in (("train", rows["train"]), ("test", rows["test"]), ("replay", rows["train"][::2])):
                own = kept if task == 0 else kept[1:]
                own = [row for row in own if side != "replay" or row in rows["train"][task:]]
                self.valid[f"x_{side}{task}.csv"] = ("image,label\n" + "".join(own)).encode()
        record = {"schema": 1, "name": "x", "class_names": ["a", "b", "c"], "image_root": str(root), "num_tasks": 2}
        record |= {"diminish_rate": 0.5, "seed": 0, "lt_gamma": 1.0, "images_per_class": None, "domains": None}
        record |= {"tasks": [{"classes": [0, 1]}, {"classes": [1, 2]}], "counts": {"train": [9, 8]}}
        self.valid["dataset.json"] = json.dumps(record).encode()
        self.config = options.make(
            csv_dir=self.folder, cache_dir=folder / "cache", image_size=SIDE, job_dir=folder / "job"
        )

    def generate(self, dice: random.Random) -> dict[str, bytes]:
        files = {}
        for name in dice.sample(FILES, dice.choice((1, 1, 2))):
            structured = mutated_json if name == FILES[-1] else mutated_csv
            files[name] = (structured if dice.random() < 0.7 else mutated)(self.valid[name], dice)
        return files

    def run(self, files: dict[str, bytes]) -> None:
        for name, content in {**self.valid, **files}.items():
            (self.folder / name).write_bytes(content)
        dataset.load_dataset(self.config, torch.device("cpu"), lambda line: None)


class ImageTarget:
    """Images of each format and mode, mutated, decoded as the cache's build and predict do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        noise = np.random.default_rng(0)
        self.valid: list[bytes] = []
        for kind, modes in FORMATS.items():
            for mode in modes:
                grey = Image.fromarray(noise.integers(0, 256, (13, 17), dtype=np.uint8))
                image = (
                    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
                )
                out, exif = io.BytesIO(), Image.Exif()
                exif[0x0112] = 6
                more = {"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {}
                more |= {"save_all": True, "append_images": [image] * 2} if kind in ("GIF", "TIFF", "WEBP") else {}
                image.save(out, kind, **more)
                self.valid.append(out.getvalue())

    def generate(self, dice: random.Random) -> dict[str, bytes]:
        return {"image": mutated(dice.choice(self.valid), dice)}

    def run(self, files: dict[str, bytes]) -> None:
        (self.folder / "image").write_bytes(files["image"])
        decode(self.folder / "image", 32)


def fault(work: Callable[[], None], seconds: float, outcomes: Counter) -> str | None:
    """What is wrong with how ``work()`` ends; None for success and for a proper refusal."""
    former = signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        work()
        outcomes["loaded"] += 1
    except UserError as error:
        outcomes["refused"] += 1
        line = one_line(error)
        if not line.isprintable() or len(line) > LONGEST:
            return f"a message of {len(line)} characters: {line[:200]}"
    except TooLong:
        return f"longer than {seconds:g} s"
    except Exception:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)
    return None


def _too_long(number: int, frame: object) -> None:
    raise TooLong


def held() -> float:
    """The most memory this process has held, in GB (Linux counts kB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def fuzz(name: str, target: CsvTarget | ImageTarget, count: int, args) -> int:
    """The number of faults."""
    outcomes, faults, begin = Counter(), 0, time.monotonic()
    most = max(args.gigabytes, held())
    for number in range(count):
        files = target.generate(random.Random(f"{args.seed} {name} {number}"))
        wrong = fault(lambda files=files: target.run(files), args.seconds, outcomes)
        if wrong is None and held() > most:
            wrong, most = f"{held():.2f} GB were held", held()
        if wrong:
            faults += 1
            folder = Path(args.out) / f"{name}-{args.seed}-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            for file, content in files.items():
                (folder / file).write_bytes(content)
            (folder / "fault.txt").write_text(wrong)
            print(f"fault: {folder}: {one_line(wrong.strip().splitlines()[-1])}", flush=True)
    took = time.monotonic() - begin
    print(
        f"{name}: {count} inputs, {outcomes['loaded']} loaded, {outcomes['refused']} refused in one line, "
        f"{faults} faults, {took:.0f} s, peak {held():.2f} GB",
        flush=True,
    )
    return faults


def guided(targets: list[CsvTarget | ImageTarget], count: int, args) -> None:
    """atheris chooses the bytes; the first says which file they are. Ends the process."""
    try:
        import atheris
    except ImportError:
        raise UserError("--atheris: pip install lifequant[fuzz]") from None
    corpus = Path(args.out)
    corpus.mkdir(parents=True, exist_ok=True)
    csvs, images = targets
    for number, content in enumerate(images.valid):
        (corpus / f"image{number}").write_bytes(bytes([len(FILES)]) + content)
    for number, name in enumerate(FILES):
        (corpus / name).write_bytes(bytes([number]) + csvs.valid[name])

    def one(content: bytes) -> None:
        kind = content[0] % (len(FILES) + 1) if content else 0
        target, name = (csvs, FILES[kind]) if kind < len(FILES) else (images, "image")
        wrong = fault(lambda: target.run({name: content[1:]}), args.seconds, Counter())
        if wrong or held() > args.gigabytes:
            raise AssertionError(wrong or f"{held():.2f} GB were held")

    for module in (
        dataset,
        dataset.dataset_json,
        sys.modules["lifequant.data.task_csv"],
        sys.modules["lifequant.data.decode"],
    ):
        for value in list(vars(module).values()):
            if callable(value) and getattr(value, "__module__", None) == module.__name__ and hasattr(value, "__code__"):
                atheris.instrument_func(value)
    runs = [
        f"-runs={count}",
        f"-seed={args.seed + 1}",
        f"-artifact_prefix={corpus}/fault-",
        "-max_len=8192",
        "-close_fd_mask=0",
    ]
    atheris.Setup([sys.argv[0], *runs, str(corpus)], one)
    atheris.Fuzz()


def main(argv: list[str]) -> int:
    parser = Parser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--csvs", type=int_at_least(0), default=20_000, help="folders of task CSVs to try")
    parser.add_argument("--images", type=int_at_least(0), default=2_000, help="images to try")
    parser.add_argument("--seed", type=int_at_least(0), default=0, help="of the mutations")
    parser.add_argument("--out", default="faults", help="folder for the inputs that are faults")
    parser.add_argument("--seconds", type=real(above=0), default=5.0, help="that one input may take")
    parser.add_argument("--gigabytes", type=real(above=0), default=2.0, help="of memory that the process may hold")
    parser.add_argument("--atheris", action="store_true", help="coverage guided")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch, quiet():
        targets = [CsvTarget(Path(scratch)), ImageTarget(Path(scratch))]
        for target in targets:  # what is not mutated must load
            for valid in (
                [{}] if isinstance(target, CsvTarget) else [{"image": content} for content in target.valid[:5]]
            ):
                target.run(valid)
        if args.atheris:
            guided(targets, args.csvs + args.images, args)
        faults = fuzz("csv", targets[0], args.csvs, args) + fuzz("image", targets[1], args.images, args)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
