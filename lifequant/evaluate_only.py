"""--test_only: the accuracies of a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lifequant.checkpointing import checkpoint
from lifequant.common.errors import UserError
from lifequant.config import Config
from lifequant.data.dataset import load_dataset
from lifequant.evaluation.evaluate import Scores, evaluate
from lifequant.models.build import build
from lifequant.runtime import distributed
from lifequant.runtime.device import pick_device
from lifequant.training import initialize


def test(config: Config, notes: Sequence[str] = ()) -> Scores:
    """--test_only: print the accuracies of job_dir's model, or of --source_file's; writes nothing. Raises UserError."""
    device = pick_device(config)
    distributed.join(device)
    for line in notes:
        print(line)
    path = (
        initialize.find_source(config)
        if config.source_file
        else checkpoint.find_model(Path(config.job_dir) / "model_best.pt")
    )
    if path is None:
        raise UserError(f"--test_only: no model_best.pt in --job_dir {config.job_dir}, and no --source_file")
    dataset = distributed.one_first(lambda: load_dataset(config, device, print))
    model = build(config, dataset.num_classes).to(device)
    if not checkpoint.load_source(path, config, model, dataset.num_classes):
        raise UserError(
            f"{path}: its quantizer or bits are others; give those it was trained with (config.json beside it)"
        )
    scores = evaluate(model, dataset, config.eval_batch_size, with_error=False)
    for task_index, task in enumerate(dataset.ids):
        print(
            f"task {task}: top-1 {scores.top1[task_index]:.2f} %  top-5 {scores.top5[task_index]:.2f} %  "
            f"task-masked {scores.masked[task_index]:.2f} %"
        )
    print(f"average accuracy {sum(scores.top1) / len(scores.top1):.2f} %  ({path})")
    return scores
