"""From a run's history to results.json. Accuracies are in percent. An undefined value is None, and never NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lifequant.checkpointing import checkpoint, run_folder
from lifequant.common import fault_injection
from lifequant.data import codec
from lifequant.evaluation import metrics
from lifequant.evaluation.evaluate import evaluate
from lifequant.evaluation.nearest_mean import nme_accuracy
from lifequant.qat.code_usage import CodeCounts, code_counts
from lifequant.qat.packing import packed_model_bytes
from lifequant.qat.weights import quantized_weights, weights
from lifequant.quantizers.base import FakeQuant
from lifequant.results import curves, schema
from lifequant.results.run_warnings import warn_of, warn_of_one_code
from lifequant.results.table import table
from lifequant.results.versions import versions
from lifequant.runtime.device import arithmetic
from lifequant.training import progress
from lifequant.training.divergence import refuse_nonfinite, stop_at_last_checkpoint
from lifequant.training.history import means
from lifequant.training.memory import memory_bytes
from lifequant.training.run import Run

SCHEMA = 1
SMALL = 32  # pixels a side
CODE_PIXELS = 256 * SMALL**2  # of training images over which activation codes are counted: 256 images, fewer large ones


def read_window(run: Run, task: Any, bar: Any, lr: float) -> None:
    """Read the means since the last reading, for the curves and the progress bar.

    Raises UserError where they are not finite.
    """
    with run.timer.within("step"):  # a GPU has still to do the steps before
        values = means(run.sums, run.term_names)
        stop_at_last_checkpoint(run)
    refuse_nonfinite(run, values["loss"], "the mean loss")
    run.sums.zero_()
    speed = run.timer.images_per_second()
    curves.add_training(run, values, lr, speed)
    progress.show(run, task, bar, values)


def count_codes(run: Run, task: Any) -> dict[str, CodeCounts]:
    """How often each code of each tensor occurs, of activations over the first images of the task's pool."""
    with run.timer.within("evaluation"):
        images = max(8, CODE_PIXELS // max(SMALL, run.config.image_size) ** 2)
        return code_counts(run.model, task.batch(task.pool[:images])[0])


def end_task(run: Run, task: Any) -> None:
    """Evaluate after a task: add a row to each matrix, write curves and histograms, warn."""
    history, task_index = run.history, task.task_index
    with run.timer.part("evaluation", "evaluation"):
        scores = evaluate(run.model, run.data, run.config.eval_batch_size)
        if run.config.nme:
            exemplars = run.data.stored(task_index + 1, run.config)
            coded = run.data.coded(exemplars, run.config)
            history["top1_nme"].append(nme_accuracy(run.model, run.data, exemplars, run.config.eval_batch_size, coded))
    refuse_nonfinite(run, sum(scores.error), "the quantization error on test images")
    for name, row in (
        ("top1", scores.top1),
        ("top5", scores.top5),
        ("top1_masked", scores.masked),
        ("quantization_error", scores.error),
    ):
        history[name].append(row)
    history["tasks"].append(
        {"train_images": len(task.new_rows), "replay_images": len(task.replay), "stored_images": task.buffer_count}
    )
    history["training"].append(means(run.epoch_sums, run.term_names))
    history["memory"] = memory_bytes(run, task)
    if run.data.domains:
        history["tasks"][-1] |= {
            "replay_of_domains": replay_of_domains(run, task),
            "importance_bytes": history["memory"]["importance"],
        }
    if run.oscillations:
        shares = run.oscillations.share()
        history["oscillation"].append({"oscillating": shares, "frozen": run.oscillations.frozen_share()})
    codes = run.codes = count_codes(run, task)
    for w in weights(run.model):
        if isinstance(w.quant, FakeQuant) and (codes[f"{w.of}.{w.quantizer}"].counts > 0).sum() == 1:
            warn_of_one_code(run, w.name)
    curves.add_task_end(run, codes)
    warn_of(run, task_index)
    names = run.data.domains or [f"task {id}" for id in run.data.ids]
    accuracies = "  ".join(f"{name} {value:.2f}" for name, value in zip(names, scores.top1, strict=True))
    run.log.say(f"after {'all tasks' if run.method.joint else names[task_index]}, top-1 (%): {accuracies}")


def replay_of_domains(run: Run, task: Any) -> dict[str, int]:
    """{former domain: number of its images in the task's replay}"""
    replay = set(task.replay.tolist())
    rows_of = zip(run.data.domains, run.data.new_rows[: task.task_index], strict=False)
    return {domain: len(replay.intersection(rows)) for domain, rows in rows_of}


def snapshots(run: Run) -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    """The quantized weights and the weights' scales at the end of each task, read from the checkpoints of that time."""
    kept, steps = [], []
    with run.timer.within("checkpoint"):
        run.writer.wait()
    now = {name: value.clone() for name, value in run.model.state_dict().items()}
    for task_index in range(run.num_tasks):
        run.model.load_state_dict(checkpoint.read(run_folder.task_file(run.config.job_dir, task_index), "run")["model"])
        kept.append({name: value.cpu() for name, value in quantized_weights(run.model).items()})
        quants = {w.name: w.quant for w in weights(run.model)}
        steps.append(
            {name: quant.scale().mean().item() for name, quant in quants.items() if isinstance(quant, FakeQuant)}
        )
    run.model.load_state_dict(now)
    return kept, steps


def assemble(run: Run) -> dict[str, Any]:
    """The content of results.json."""
    history, data = run.history, run.data
    R = history["top1"]
    codes = run.codes or count_codes(run, data.task(run.num_tasks - 1, run.config, run.method.joint))
    for name, (quant, _, counts) in codes.items():
        if int((counts > 0).sum()) > 2**quant.bits and not quant.exceeds_bits:
            raise RuntimeError(f"{name} has {int((counts > 0).sum())} codes, more than {quant.bits} bits have")
    quantized, steps = snapshots(run)
    tests = [len(rows) for rows in data.test_rows]
    joint = run.method.joint
    images = (
        history["tasks"]
        if not joint
        else [{"train_images": len(rows), "replay_images": 0, "stored_images": 0} for rows in data.new_rows]
    )
    return {
        "schema": SCHEMA,
        "config": run.config.asdict(paths=False),
        "tasks": [
            {
                "id": id,
                **({"domain": data.domains[i]} if data.domains else {}),
                "classes": data.classes(i),
                **images[i],
                "test_images": tests[i],
            }
            for i, id in enumerate(data.ids)
        ],
        "top1": R,
        "top5": history["top5"],
        "top1_masked": history["top1_masked"],
        "average_accuracy": metrics.average_accuracy(R),
        "average_accuracy_weighted": metrics.average_accuracy_weighted(R, tests),
        "average_incremental_accuracy": metrics.average_incremental_accuracy(R),
        "forgetting": metrics.forgetting(R),
        "forgetting_rate": metrics.forgetting_rate(R),
        "bwt": metrics.bwt(R),
        "fwt": metrics.fwt(R, history["baseline"]) if history["baseline"] else None,
        "space_shift": metrics.space_shift(quantized),
        "step_change": metrics.step_change(steps),
        "top1_nme": history["top1_nme"] or None,
        "average_accuracy_nme": metrics.average_accuracy(history["top1_nme"]),
        "quantization_error": history["quantization_error"],
        "oscillation": history["oscillation"] or None,
        "max_codes_per_tensor": {
            name: {"codes": int((c > 0).sum()), "bits": q.bits} for name, (q, _, c) in codes.items()
        },
        "code_histograms": {name: {"first_code": first, "counts": c.tolist()} for name, (_, first, c) in codes.items()},
        "memory_bytes": {"packed_model": packed_model_bytes(run.model), **history["memory"]},
        "seconds": round(history["seconds"], 3),
        "seconds_by_part": {name: round(seconds, 3) for name, seconds in history["seconds_by_part"].items()},
        "images_per_second": run.timer.images_per_second(),
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "cpu",
        "arithmetic": {"training": arithmetic(run.config, run.device), "evaluation": "float32"},
        "warnings": run.log.warnings,
        "skipped_steps": history.get("skipped", {}).get("steps", 0),
        "versions": versions() | codec.versions(run.config.replay_codec),
    }


def finish(run: Run) -> dict[str, Any]:
    """Write model_best.pt and results.json, print the table."""
    run.timer.stop()
    run.timer.switch("logging")
    results = assemble(run)
    folder = Path(run.config.job_dir)
    model = checkpoint.model_state(run.config, run.model, run.data.class_names)
    for target in (folder, folder / "checkpoint"):
        checkpoint.write(target / "model_best.pt", model)
    if not run.config.val_fraction:
        run.log.say("model_best.pt is the last epoch's model: --val_fraction chooses the best one")
    curves.add_final_table(run, table(results))
    most = [(c["codes"], c["bits"], name) for name, c in results["max_codes_per_tensor"].items()]
    if most:
        ok = sum(codes <= 2**bits for codes, bits, _ in most)
        run.log.say(f"codes: {ok} of {len(most)} quantized tensors use at most 2^bits values")
    run.log.say(table(results))
    results["time_share"] = run.timer.time_share()
    fault_injection.point("table")
    run_folder.write_json(folder / "results.json", results)
    return results


def read(folder: Path) -> dict[str, Any] | None:
    """results.json of a finished run; None where there is none. Raises UserError for a file that no run wrote."""
    try:
        return schema.read(folder / "results.json", schema.TABLE)
    except FileNotFoundError:
        return None
