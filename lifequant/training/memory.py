"""What is kept between tasks, in bytes, and ``--memory_budget``."""

from __future__ import annotations

from lifequant.common.errors import UserError
from lifequant.data.task import Task
from lifequant.qat.packing import packed_model_bytes
from lifequant.training.run import Run

KEPT = ("importance", "reference", "logits", "average", "oscillation")


def memory_bytes(run: Run, task: Task) -> dict[str, int]:
    """{name: bytes} of all that is kept beside the packed model.

    These are replay images, what the method and the penalty keep, the moving average, and the counts of oscillations.
    """
    memory = {"replay": task.replay_bytes(), **dict.fromkeys(KEPT, 0)}
    for callback in run.callbacks:
        for name, size in callback.memory_bytes().items():
            memory[name] = memory.get(name, 0) + size
    memory["average"] = run.ema.nbytes() if run.ema else 0
    memory["oscillation"] = run.oscillations.memory_bytes() if run.oscillations else 0
    if run.teacher is not None:
        memory["reference"] += packed_model_bytes(run.model)
    return memory


def left_for_images(run: Run, task: Task) -> int:
    """Bytes of ``--memory_budget`` that the model and all that does not go with images leave.

    Raises UserError with the sum if they take more than the budget.
    """
    budget = run.config.memory_budget
    kept = {"packed_model": packed_model_bytes(run.model), **memory_bytes(run, task)}
    kept.pop("replay")
    if any(callback.bytes_per_image(task.num_classes) for callback in run.callbacks):
        kept.pop("logits")
    if (total := sum(kept.values())) > budget:
        parts = ", ".join(f"{name} {size:,}" for name, size in kept.items() if size)
        raise UserError(
            f"--memory_budget {budget:,} bytes: {run.config.method} keeps {total:,} between tasks without any image ({parts}): "
            "give more, or choose another method or penalty"
        )
    return budget - total
