"""Importances of each image's own gradient: torch.func in chunks against a loop over single images.

python scripts/measure_importance.py --images 128 --rounds 5 --chunks 16 32 64

Both are run in turn in each round, in float32: medians and their ratio. That they are the same is checked in float64, where
it is below 1e-9 of a layer's largest (exits 1 otherwise): in float32 a sum in another order moves a few activations across a
rounding boundary, by a whole step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lifequant import options
from lifequant.methods import importance
from lifequant.models.build import build
from lifequant.qat.calibration import calibrate_network

TOLERANCE = 1e-9


def loop(net: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """{layer: mean over images of (d CE / d w)^2}, one image at a time."""
    weights = importance.latent_weights(net)
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for image, label in zip(x, y, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(net(image[None]), label[None]), list(weights.values()))
        for value, g in zip(total.values(), gradients, strict=True):
            value += g.square()
    return {name: value / len(x) for name, value in total.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, nargs="+", default=[importance.CHUNK])
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build(options.make(method="ours", quantizer="lsq", bitW=4, abitW=4), 10)
    x = torch.randn(args.images, 3, 32, 32).to(memory_format=torch.channels_last)
    y = torch.randint(10, (args.images,))
    calibrate_network(model, x)
    model.train()(x)  # BatchNorm statistics of this input
    net = importance.at_quantized_weights(model)
    rows = {"loop": 0, **{f"chunks of {size}": size for size in args.chunks}}
    seconds: dict[str, list[float]] = {row: [] for row in rows}
    for _ in range(args.rounds):
        for row, size in rows.items():
            importance.CHUNK = size
            begin = time.perf_counter()
            importance.per_sample(net, [(x, y)]) if size else loop(net, x, y)
            seconds[row].append(time.perf_counter() - begin)
    base = statistics.median(seconds["loop"])
    for row, values in seconds.items():
        median = statistics.median(values)
        print(f"{row:<14}{median:8.3f} s  ({min(values):.3f} .. {max(values):.3f})  loop / this {base / median:6.2f}")
    net, x = net.double(), x[:32].double()
    found = importance.per_sample(net, [(x, y[:32])])
    apart = max(float((found[name] - v).abs().max() / v.max()) for name, v in loop(net, x, y[:32]).items())
    print(f"largest relative difference {apart:.1e} (at most {TOLERANCE:g})")
    return int(apart > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
