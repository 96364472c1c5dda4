"""What the readers of official archives share: images that are copied as they are, split 80:20, and checked counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lifequant.common.commands import command
from lifequant.common.errors import UserError
from lifequant.common.safe_files import short
from lifequant.common.text import say, some
from lifequant.data.create.archives import Source
from lifequant.data.create.class_folders import EXTENSIONS
from lifequant.data.create.prepared import Contents, Place
from lifequant.data.split import TEST_SHARE, lowest, share_of_each

Images = dict[str, dict[str, dict[str, str]]]  # {part or domain: {class: {file: its name in the source}}}


def is_image(name: str) -> bool:
    """By its ending; not what macOS adds (__MACOSX/._frame_0001.jpg)."""
    return name.lower().endswith(EXTENSIONS) and not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def add(images: Images, source: Source, part: str, label: str, name: str) -> None:
    """Add an image. Raises UserError if another one of the class has its file name."""
    file = name.rsplit("/", 1)[-1]
    former = images.setdefault(part, {}).setdefault(label, {}).setdefault(file, name)
    if former != name:
        raise UserError(
            f"--source {source.path}: {short(former)} and {short(name)} are of one class and have one name: "
            "name the folder that has the data set once"
        )


def checked(
    images: Images, source: Source, title: str, parts: Sequence[str], classes: Sequence[str] | int
) -> list[str]:
    """The sorted class names. Raises UserError where a part or a class is missing, or one is there that is not known."""
    odd = _odd(images, parts, classes)
    if odd:
        raise UserError(
            f"--source {source.path}: not {title}: {odd}; give its archive as it is distributed, "
            f"or make task CSVs of your own images without this step ({command('tasks')})"
        )
    return sorted(images[parts[0]])


def _odd(images: Images, parts: Sequence[str], classes: Sequence[str] | int) -> str:
    """The first thing that tells the images from the data set, or an empty text."""
    for part in parts:
        if part not in images:
            return f"no images of {part} ({', '.join(parts)} are expected)"
    names = set(images[parts[0]]) if isinstance(classes, int) else set(classes)
    if isinstance(classes, int) and len(names) != classes:
        return f"{len(names)} classes, and it has {classes}"
    for part in parts:
        if lacking := names - set(images[part]):
            return f"{part} lacks the class {some(lacking)}"
        if more := set(images[part]) - names:
            return f"{part} has also the class {some(more)}"
    return ""


def tell_counts(images: Images, title: str, official: dict[str, int]) -> None:
    """Say where a part has other numbers of images than the official data set."""
    found = {part: sum(map(len, images[part].values())) for part in images}
    if odd := [f"{part} {found[part]} (of {n})" for part, n in official.items() if found.get(part, n) != n]:
        say(
            f"note: other numbers of images than {title} has: {', '.join(odd)}; results can't be compared with published ones"
        )


def split(images: Images, seed: int, training_only: frozenset[str] = frozenset()) -> Images:
    """{<domain>/train, <domain>/test: ...}: a seeded fifth of each class is for testing, as ``lifequant tasks`` chooses it from an
    unpacked folder. Raises UserError.

    ``training_only``: names in the source that are never for testing.
    """
    parts: Images = {}
    for domain, classes in images.items():
        for label, files in classes.items():
            if len(files) < 2:
                raise UserError(f"{domain}/{label}: one image; a class needs two, for training and for testing")
            free = [file for file, name in files.items() if name not in training_only]
            paths = [f"{domain}/images/{label}/{file}" for file in free]
            keep = share_of_each({0: len(files)}, TEST_SHARE)
            test = {free[row] for row in lowest(paths, [0] * len(free), keep, seed, "domain_test")}
            for file, name in files.items():
                part = f"{domain}/{'test' if file in test else 'train'}"
                parts.setdefault(part, {}).setdefault(label, {})[file] = name
    return parts


def copies(source: Source, origin: str, names: list[str], images: Images) -> Contents:
    """The images of each part, copied byte for byte."""
    of: dict[Place, str] = {
        (part, label, file): name
        for part in sorted(images, key=lambda part: (part.split("/")[:-1], part.endswith("test")))
        for label in sorted(images[part])
        for file, name in images[part][label].items()
    }

    def read(places: Sequence[Place]) -> Iterator[tuple[Place, bytes]]:
        targets: dict[str, list[Place]] = {}
        for place in places:
            targets.setdefault(of[place], []).append(place)
        for name, content in source.contents(targets.keys()):
            for place in targets[name]:
                yield place, content

    return Contents(origin, names, {place: source.sizes[name] for place, name in of.items()}, read)
