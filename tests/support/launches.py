"""What a training step asks of a GPU outside of what torch.compile takes: its launches of kernels, by line of source.
``python tests/support/launches.py`` prints them.

They are counted on a pretended GPU. torch.compile is stood in for: what it is given runs uncounted, forward and backward, and
costs one launch for each of both, and a copy for each tensor that it is handed as an argument (a CUDA graph reads
its inputs at fixed places). What it takes from a closure must lie at a fixed place; tests/test_launches.py has a test of that.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.append(str(Path(__file__).resolve().parents[1]))  # as pytest does

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lifequant.data.task import Task
from support import pretended_gpu as pretended
from support.tiny import Tiny, train, write_csvs, write_images

SMALL = {"image_size": 8, "method": "ours"}
CASES: list[tuple[int, dict[str, Any]]] = [  # (launches of a step of ResNet-20 at most, flags)
    (40, {}),
    (40, {"loss": "class_balanced", "method": "derpp"}),
    (60, {"method": "si"}),
    (60, {"method": "rwalk"}),
    (60, {"ema": 0.9, "penalty": "proxq_step"}),
    (80, {"freeze_oscillating": 0.02}),
]
# Tensors that one launch of a multi-tensor kernel takes, by the number of its lists (torch's multi_tensor_apply).
TENSORS = {1: 770, 2: 448, 3: 336, 4: 252, 5: 210}
NO_KERNEL = {"empty", "detach", "empty_like", "new_empty", "empty_strided", "_local_scalar_dense", "lift_fresh"}
TWO = {"constant_pad_nd", "topk"}  # fill, then copy; sort the parts, then gather


def launches(func: Any, args: tuple, kwargs: dict[str, Any]) -> int:
    """Kernels that one operation launches, by torch's sources."""
    name = func._schema.name.split("::")[1]
    if func.is_view or name in NO_KERNEL:
        return 0
    lists = [a for a in (*args, *kwargs.values()) if isinstance(a, list) and a and isinstance(a[0], Tensor)]
    if name.startswith(("_foreach", "_fused")):
        layouts = [{(t.shape, t.stride()) for t in tensors} for tensors in zip(*lists, strict=False)]
        if any(len(found) > 1 for found in layouts):  # else torch takes one tensor after another
            return len(layouts)
        written = not name.endswith("_")
        return -(-len(layouts) // TENSORS[len(lists) + written])
    return 2 if name in TWO else 1


class Counting(TorchDispatchMode):
    """Counts launches on the pretended GPU, by line of source, while ``counts`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] | None = None
        self.results: set[int] = set()  # ids of what stood-in functions gave

    def add(self, number: int) -> None:
        if self.counts is not None and number:
            self.counts[pretended.place()] += number

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if self.counts is not None:
            with torch._C.DisableTorchFunction():
                if any(map(pretended.on_gpu, pretended.tensors((args, kwargs, [result])))):
                    self.add(launches(func, args, kwargs))
        return result

    def uncounted(self, call: Callable[[], Any]) -> Any:
        counts, self.counts = self.counts, None
        try:
            return call()
        finally:
            self.counts = counts

    def compile(self, function: Callable, **_: Any) -> Callable:
        """In place of torch.compile."""

        def compiled(*args: Any, **kwargs: Any) -> Any:
            result = self.uncounted(lambda: function(*args, **kwargs))
            self.add(1 + len(pretended.tensors((args, kwargs))))
            self.results = {id(t) for t in pretended.tensors([result])}
            return result

        return compiled


def count_step(tiny: Any, job: Path, at: int = 3, **flags: Any) -> Counter[str]:
    """{line of source: launches} from one batch of task 1 to the next; ``at``: which of them, from 1."""
    counting, counts = Counting(), Counter()
    batch, backward = Task.training_batch, Tensor.backward
    calls = 0

    def training_batch(task: Task, *args: Any) -> Any:
        nonlocal calls
        calls += task.task_index == 1
        counting.counts = counts if calls == at else None
        return batch(task, *args)

    def of_compiled(loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if id(loss) not in counting.results:
            return backward(loss, *args, **kwargs)
        counting.uncounted(lambda: backward(loss, *args, **kwargs))
        counting.add(1)

    with (
        pretended.pretended_gpu(),
        counting,
        mock.patch.object(torch, "compile", counting.compile),
        mock.patch.object(Task, "training_batch", training_batch),
        mock.patch.object(Tensor, "backward", of_compiled),
    ):
        train(tiny, job, device="cuda", compile="on", print_freq=1000, **flags)
    assert calls > at
    return counts


def main() -> None:
    with tempfile.TemporaryDirectory() as top:
        images = write_images(Path(top) / "images")
        csvs = write_csvs(images, Path(top) / "csvs")
        for number, (most, flags) in enumerate(CASES):
            with contextlib.redirect_stdout(io.StringIO()):
                counts = count_step(Tiny(images, csvs, csvs), Path(top) / str(number), **SMALL | flags)
            words = " ".join(f"--{name} {value}" for name, value in (SMALL | flags).items())
            print(f"{sum(counts.values())} launches, at most {most}: {words}")
            for place, count in counts.most_common():
                print(f"{count:6}  {place}")


if __name__ == "__main__":
    main()
