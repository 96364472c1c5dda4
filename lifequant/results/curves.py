"""What TensorBoard shows of a run: one TensorBoard run a training, over the steps of all tasks.

TensorBoard sorts tags by name, so a number before each group makes the order: what is looked at first comes first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lifequant.evaluation import metrics
from lifequant.evaluation.evaluate import evaluate
from lifequant.qat.code_usage import CodeCounts
from lifequant.qat.layers import fake_quants, weight_layers
from lifequant.qat.packing import packed_model_bytes
from lifequant.results import tensorboard_settings
from lifequant.results.tensorboard_pictures import codes_picture, matrix_picture
from lifequant.training.divergence import stop_at_last_checkpoint
from lifequant.training.run import Run
from lifequant.training.schedule import epoch_images, evaluation_interval

TRAINING = {
    "top1": "1_accuracy/train_top1",
    "loss": "3_loss/all",
    "task_loss": "3_loss/task",
    "distillation": "3_loss/distillation",
    "penalty": "3_loss/penalty",
    "top5": "9_more_accuracy/train_top5",
}
_MATRICES = ("top1", "top5", "top1_masked")
CLASS_IL = "Class-IL: the network chooses among the classes of all tasks."
TASK_IL = "Task-IL: the network chooses among the task's own classes."
FORGETTING = "Best accuracy on a task after an earlier task, less the accuracy now, in points. Less is better."


def begin(run: Run) -> None:
    """Begin the run's curves, or go on with them after a resumption.

    TensorBoard forgets what a killed run wrote after its last checkpoint; what it wrote at the checkpoint's own step stays.
    In a new folder, a run that begins with another's state gets the accuracies of its former tasks.
    """
    done = run.global_step
    here = any((Path(run.config.job_dir) / "run").glob("events.*"))
    run.log.open_curves(done + 1 if done else 0)
    if done and here:
        return
    tensorboard_settings.write(run)
    for task_index in range(run.task_index):
        _add_accuracies(run, {name: run.history[name][: task_index + 1] for name in _MATRICES}, task_index)


def add_training(run: Run, values: Mapping[str, float], lr: float, speed: float | None) -> None:
    """Add means since the last reading (history.means), the learning rate, images a second and the scales."""
    curves, step = run.log.curves, run.global_step
    for name, value in values.items():
        curves.add_scalar(TRAINING[name], value, step)
    curves.add_scalar("4_learning_rate", lr, step)
    if speed:
        curves.add_scalar("5_speed/images_per_second", speed, step)
    if quants := dict(fake_quants(run.model)):
        scales = torch.stack([quant.scale().mean() for quant in quants.values()]).tolist()  # a GPU waits once
        for name, scale in zip(quants, scales, strict=True):
            curves.add_scalar(f"6_quantizer_scales/{name}", scale, step)


def evaluate_within(run: Run, epoch: int) -> None:
    """Add test accuracies if ``epoch`` is due (``--eval_every``); a task's last epoch is not, since its end is evaluated.

    They are those of the model as it is, or of its moving average with ``--ema``. The run itself is not changed.
    """
    config, data = run.config, run.data
    images = [epoch_images(config, *sizes) for sizes in run.task_sizes]
    interval = evaluation_interval(config, images, len(data.test.paths), run.compiled)
    if (epoch + 1) % interval or epoch + 1 == config.num_epochs:
        return
    with run.timer.within("step"):  # a GPU has still to do the steps before
        stop_at_last_checkpoint(run)
    with run.timer.within("evaluation"):
        model = run.ema.model if run.ema else run.model
        scores = evaluate(model, data, config.eval_batch_size, with_error=False)
    now = {"top1": scores.top1, "top5": scores.top5, "top1_masked": scores.masked}
    _add_accuracies(run, {name: [*run.history[name], now[name]] for name in _MATRICES}, run.task_index, run.global_step)
    run.timer.begin_task()  # else the evaluation would count as a slow step


def add_task_end(run: Run, codes: Mapping[str, CodeCounts]) -> None:
    """Add what a finished task is known by: accuracies, the matrix, codes, oscillations, memory, histograms of weights."""
    curves, step, history = run.log.curves, run.global_step, run.history
    _add_accuracies(run, history, run.task_index)
    for name, (quant, _, counts) in codes.items():
        used = int((counts > 0).sum()) / (quant.qp - quant.qn + 1)
        curves.add_scalar(f"7_quantizer_codes/used/{name}", used, step)
    if codes:
        curves.add_image("7_quantizer_codes/bars", codes_picture(codes), step)
    if run.oscillations:
        for name, share in history["oscillation"][-1]["oscillating"].items():
            curves.add_scalar(f"8_oscillating_weights/{name}", share, step)
    kept = packed_model_bytes(run.model) + sum(history["memory"].values())
    curves.add_scalar(
        "9_memory_kB", kept / 1000, step, "The packed model, and all that is kept beside it for later tasks."
    )
    for name, layer in weight_layers(run.model):
        curves.add_histogram(f"weights/{name}", layer.weight.detach().flatten().cpu().numpy(), step)


def add_final_table(run: Run, text: str) -> None:
    """Add the final table, after the last step, so that a repeated end of a run replaces it."""
    run.log.curves.add_text("1_results", f"```\n{text}\n```", run.global_step + 1)
    tensorboard_settings.write_end(run.log.curves)
    run.log.flush()


def _add_accuracies(
    run: Run, rows: Mapping[str, Sequence[Sequence[float]]], task_index: int, step: int | None = None
) -> None:
    """``rows``: the matrices of results.json until now. ``step``: within a task; None at the task's end."""
    curves, ids = run.log.curves, run.data.ids
    at = run.steps_before(task_index + 1) if step is None else step
    top1, top5, masked = (rows[name][-1] for name in _MATRICES)
    seen = len(ids) if run.method.joint else task_index + 1
    curves.add_scalar(
        "1_accuracy/average_class_il", sum(top1[:seen]) / seen, at, f"Mean over the tasks seen. {CLASS_IL}"
    )
    curves.add_scalar(
        "1_accuracy/average_task_il", sum(masked[:seen]) / seen, at, f"Mean over the tasks seen. {TASK_IL}"
    )
    for i, id in enumerate(ids):
        curves.add_scalar(f"1_accuracy/test_task{id}", top1[i], at, f"On the test images of task {id}. {CLASS_IL}")
        curves.add_scalar(f"9_more_accuracy/task_il_task{id}", masked[i], at, TASK_IL)
        curves.add_scalar(f"9_more_accuracy/top5_task{id}", top5[i], at, CLASS_IL)
    forgotten = metrics.forgetting_of_tasks(rows["top1"])
    if forgotten:
        curves.add_scalar("2_forgetting/average", sum(forgotten) / len(forgotten), at, FORGETTING)
        for id, value in zip(ids, forgotten, strict=False):  # the newest task has nothing to forget yet
            curves.add_scalar(f"2_forgetting/task{id}", value, at, FORGETTING)
    if step is None:
        curves.add_image("1_accuracy/matrix", matrix_picture(rows["top1"], ids), at)
