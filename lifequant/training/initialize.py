"""How a run begins: with a random model, with a source model, or with another run's state."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from lifequant.checkpointing import checkpoint, float_weights, run_folder, source
from lifequant.common.commands import command
from lifequant.common.errors import UserError
from lifequant.config import Config
from lifequant.evaluation.evaluate import evaluate
from lifequant.qat.calibration import calibrate_network
from lifequant.qat.convert import calibrate
from lifequant.runtime import distributed
from lifequant.training.replay_store import choose
from lifequant.training.run import Run

CALIBRATION_IMAGES = 256
CALIBRATION_BATCH = 32  # most images at a time, of networks that may be large


def prepare(run: Run) -> None:
    """Make a new run's model, random or from a source, with scales set from data; take over the state of a forked run."""
    config, data = run.config, run.data
    first = data.task(0, config, run.method.joint)
    x, _ = first.batch(first.new_rows[torch.linspace(0, len(first.new_rows) - 1, CALIBRATION_IMAGES).long().unique()])
    _calibrate(run, x)
    if not run.method.joint and run.num_tasks > 1:
        with run.timer.within("evaluation"):
            run.history["baseline"] = evaluate(run.model, data, config.eval_batch_size, with_error=False).top1
    if config.pretrained:
        name, fits = _load_source(run)
        if not fits:
            run.log.say(
                f"source {name}: converted to {config.bitW}-bit weights and {config.abitW}-bit activations ({config.quantizer})"
            )
            _calibrate(run, x)
    if config.start_task:
        state = run_folder.fork(config, run.data_key)
        former = state["config"]
        path = Path(config.from_run)
        own = run_folder.own_flags(config.method, config.penalty)
        same = all(
            former.get(name) == value for name, value in config.asdict().items() if name in {"method", "penalty"} | own
        )
        if not same:  # the runs agree until here, so this method's state can be made as at the former task's end
            task = data.task(config.start_task - 1, config, run.method.joint)
            for callback in run.callbacks:
                callback.begin_task(run.model, data.task(0, config, run.method.joint))
            checkpoint.load_strictly(path, run.model, state["model"])
            for callback in run.callbacks:
                callback.end_task(run.model, task)
            state["method"] = run.method.state_dict()
            state["penalty"] = None if run.penalty is run.method else run.penalty.state_dict()
            former_task = state["history"]["tasks"][-1]
            if "importance_bytes" in former_task:  # of a domain; until now the other method's
                sizes = [callback.memory_bytes().get("importance", 0) for callback in run.callbacks]
                former_task["importance_bytes"] = sum(sizes)
        checkpoint.refuse_other_run(state, run.data_key, distributed.world_size(), path)
        run.load(state, path)
        if config.start_task == 1:  # the two runs may differ in what they store
            run.data.chosen.clear()
            choose(run, data.task(0, config, run.method.joint))
        run.log.say(f"begun at task {data.ids[run.task_index]} with the state of {config.from_run}")


def _calibrate(run: Run, x: Tensor) -> None:
    """Set the scales of the run's network from images ``x``, float [N, 3, H, W]."""
    if hasattr(run.model, "quantization"):  # of quantize_model, which reports and warns of what it finds
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            calibrate(run.model, x.chunk(-(-len(x) // CALIBRATION_BATCH)), train=True)  # none of them of one image
        for warning in found:
            run.log.warn(str(warning.message).replace(" (q.quantization lists all)", ""))
    else:
        calibrate_network(run.model, x)


def _load_source(run: Run) -> tuple[object, bool]:
    """Load the source model. (its name, whether its quantizers fit and were loaded with it)"""
    config, classes = run.config, run.data.num_classes
    if config.source_weights:
        name: object = f"{config.target_model} {config.source_weights}"
        weights = distributed.one_first(lambda: float_weights.download(config))
    else:
        name = path = find_source(config)
        if source.is_ours(found := float_weights.read(path)):
            return path, source.load_source(path, config, run.model, classes)
        weights = float_weights.state_dict_in(found, path)
    state = float_weights.load_float(name, weights, config, classes, run.log.say)
    checkpoint.load_float(Path(str(name)), run.model, state)
    checkpoint.refuse_nonfinite(Path(str(name)), run.model)
    return name, False


def find_source(config: Config) -> Path:
    """The source model's file; of a run's folder its model_best.pt. Raises UserError with the command that makes one."""
    path = Path(config.source_dir) / config.source_file
    found = checkpoint.find_model(path)
    if found is None and path.is_dir():
        raise UserError(
            f"--source_file {path}: this folder has no model_best.pt, which a run writes at its end; give a run's folder, "
            "or the file of a model"
        )
    if found is None:
        folder = path.parent.parent if path.parent.name == "checkpoint" else path.parent
        words = ["--csv_dir", config.csv_dir]
        for name in ("data_dir", "dataset", "num_classes", "image_size", "target_model", "shortcut", "stem"):
            if (value := getattr(config, name)) != getattr(Config, name):
                words += [f"--{name}", str(value)]
        words += ["--method", "original", "--bitW", "32", "--num_tasks", "1", "--job_dir", str(folder)]
        made = folder / "model_best.pt"
        then = "" if path.name == made.name else f" (then give --source_file {made})"
        raise UserError(
            f"--source_file {path}: no such model; this makes a 32-bit one: {command('train', *words)}{then}"
        )
    return found
