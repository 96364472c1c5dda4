"""The loss of every step of a short run with a fixed seed, to show whether a change of the code has moved the numerics.

python scripts/loss_curve.py --out before.json                     # on the one commit
python scripts/loss_curve.py --out after.json --against before.json  # on the other

4-bit ours learns two tasks of scikit-learn's digits, 208 steps of 64 images. With ``--against`` it says whether all losses
are the same to the bit, or by how much they differ at most; exit code 1 where that is more than ``--bound``.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # finds a clone that was not installed

from lifequant import options, train
from lifequant.common.arguments import Parser, real, run_main
from lifequant.data.create import images, tasks


def losses(flags: Sequence[str]) -> list[float]:
    """Task loss plus penalty of every step, in float32."""
    found: list[float] = []
    step = train.training_step

    def recorded(*args, **kwargs):
        sums = step(*args, **kwargs)
        found.append((sums[:-3].sum() / sums[-1]).item())
        return sums

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        folder_of_images, csv = f"{folder}/digits", f"{folder}/csv"
        images.main_prepare(["--dataset", "digits", "--out", folder_of_images])
        for source in ("train", "test"):
            tasks.main_tasks(["--data_dir", folder_of_images, "--output_csv", "digits.csv", "--num_tasks", "2", "--diminish_rate", "100",
                           "--source", source, "--output_dir", csv])  # fmt: skip
        argv = [
            "--csv_dir",
            csv,
            "--job_dir",
            f"{folder}/run",
            "--num_epochs",
            "8",
            "--train_batch_size",
            "64",
            "--lr",
            "0.01",
        ]
        config, _ = options.parse([*argv, *flags])
        train.training_step = recorded
        try:
            train.run(config)
        finally:
            train.training_step = step
    return found


def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="loss_curve.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--against", help="JSON file of another run to compare with")
    parser.add_argument("--bound", type=real(0), default=0.0, help="relative difference that is allowed")
    parser.add_argument("--flags", default="", help='flags of the run, in one string: --flags="--compile on"')
    args = parser.parse_args(argv)
    now = losses(args.flags.split())
    Path(args.out).write_text(json.dumps(now) + "\n", encoding="utf-8")
    print(f"{len(now)} steps, loss {now[0]:.6f} .. {now[-1]:.6f}")
    if not args.against:
        return 0
    before = json.loads(Path(args.against).read_text(encoding="utf-8"))
    if len(before) != len(now):
        print(f"{args.against} has {len(before)} steps")
        return 1
    differences = [abs(a - b) / max(abs(b), 1e-12) for a, b in zip(now, before, strict=True)]
    same = next((index for index, d in enumerate(differences) if d > 0), len(now))
    print(f"the first {same} steps are the same to the bit; largest relative difference {max(differences):.3g}")
    return int(max(differences) > args.bound)


if __name__ == "__main__":
    sys.exit(run_main(main))
