"""Config: every setting of a run, each field with the flag that sets it. Parsing is lifequant/options.py."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from lifequant import presets, registry
from lifequant.common.arguments import (
    below_one,
    boolean,
    epochs_list,
    int_at_least,
    part_of_batch,
    quality,
    rate,
    real,
    share,
    size,
)
from lifequant.losses import LOSSES
from lifequant.quantizers.base import BIT_WIDTHS

# Settings that came later, at the values that stand for what a run did before them.
ADDED = {"optimizer": "sgd", "tf32": True, "stem": "auto", "source_weights": None, "replay_batch": 0.0, "replay_selection": "random",
         "memory_budget": None, "importance_bits": 32, "replay_codec": "raw", "replay_quality": None, "replay_code_new": False}  # fmt: skip

RESUME_JOB_DIR = "True"  # the value of --resume that means the run in job_dir
REPLAY_RATE = 0.2  # the best of 10, 20 and 35 % in the paper
REFERENCE_CROP_SCALE = 0.08  # --crop_scale of --augment reference, as torchvision's recipe has it


def flag(
    default: Any, group: str, help: str, *names: str, path: bool = False, free: bool = False, **kwargs: Any
) -> Any:
    """A field and its flag. ``path``: left out of results.json; ``free``: may change when a run is resumed."""
    meta = {"group": group, "help": help, "names": names, "path": path, "free": path or free, "kwargs": kwargs}
    return field(default=default, metadata=meta)


def switch(default: bool | None, group: str, help: str, **kwargs: Any) -> Any:
    """A true boolean: ``--flag``, ``--flag True``, ``--flag False``."""
    return flag(default, group, help, type=boolean, nargs="?", const=True, metavar="BOOL", **kwargs)


def bit_width(text: str) -> int:
    """The type of --bitW, --abitW and --first_last_bits; their choices are checked by argparse."""
    try:
        return int(text)
    except ValueError:
        if any(mark in text for mark in ",/ "):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not one number: --bitW takes the bit-width of the weights, --abitW that of the activations, "
                "--bit_schedule a list like 32,8,4"
            ) from None
        raise argparse.ArgumentTypeError(f"{text!r} is not a bit-width (known: {_listed(BIT_WIDTHS)})") from None


def _listed(widths: Iterable[int]) -> str:
    return ", ".join(map(str, widths))


def bits_list(text: str) -> tuple[int, ...]:
    """``32,8,4`` -> (32, 8, 4): falling bit-widths."""
    widths = tuple(int_at_least(1)(part) for part in text.split(",") if part)
    if not widths or any(w not in BIT_WIDTHS for w in widths) or list(widths) != sorted(set(widths), reverse=True):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of falling bit-widths like 32,8,4 (known: {_listed(BIT_WIDTHS)})"
        )
    return widths


def layer_bits(text: str) -> str:
    """Checks ``layer3.*=8,fc=4/8``; see ``Config.bits_of_layers``."""
    for part in text.split(","):
        found = re.fullmatch(r"([^=,]+)=(\d+)(?:/(\d+))?", part.strip())
        if not found or any(bits and int(bits) not in BIT_WIDTHS for bits in found.groups()[1:]):
            raise argparse.ArgumentTypeError(
                f"{part!r} is not PATTERN=BITS or PATTERN=WEIGHT_BITS/ACTIVATION_BITS (known: {_listed(BIT_WIDTHS)})"
            )
    return text


DATA, METHOD, QUANT, TRAIN, RUN = "data", "method and its parts", "model and quantizer", "training", "run"


@dataclass(frozen=True)
class Config:
    """Every setting of a run, resolved. ``options`` holds the method's and the quantizer's own flags."""

    csv_dir: str = flag("data/", DATA, "folder that holds the task CSVs", path=True)
    dataset: str | None = flag(
        None, DATA, "data set's name, which begins the CSVs' names (default: the only one there)"
    )
    data_dir: str | None = flag(
        None, DATA, "folder of the images (default: as dataset.json says, else data_dir/<data set>)", path=True
    )
    cache_dir: str | None = flag(None, DATA, "folder for decoded images (default: the user's cache folder)", path=True)
    cache: str = flag("auto", DATA, "hold images decoded in memory, or encoded (as their files' bytes), or read each batch from the file of decoded ones; auto: by the memory available",
                      choices=["memory", "encoded", "mmap", "auto"], free=True)  # fmt: skip
    num_tasks: int | None = flag(
        None, DATA, "number of tasks to run (default: all that have CSVs)", type=int_at_least(1)
    )
    task_id: int | None = flag(None, DATA, "run only this task", type=int_at_least(0))
    num_classes: int | None = flag(
        None, DATA, "number of outputs of the head (default: the data set's number of classes)", type=int_at_least(2)
    )
    image_size: int = flag(
        32, DATA, "side of the images in pixels; images are scaled and cropped to it", type=int_at_least(8)
    )
    augment: str = flag("auto", DATA, "crop shifts images by up to 4 pixels, resized_crop scales up a random part; reference: torchvision's recipe for photographs, parts of the whole image, evaluated on its middle; auto: crop or resized_crop, by size",
                        choices=["auto", "crop", "resized_crop", "reference"])  # fmt: skip
    crop_scale: float = flag(
        0.35,
        DATA,
        "smallest part that resized_crop takes, as a share of the image's area (reference: 0.08)",
        type=share,
    )
    lt_gamma: float = flag(
        1.0,
        DATA,
        "imbalance ratio: images of the largest over those of the smallest training class",
        "--imbalance_ratio",
        type=real(1),
    )
    val_fraction: float = flag(
        0.0, DATA, "share of the training images that is held out to choose the best epoch", type=rate
    )
    replay_rate: float | None = flag(None, DATA, "share of each old task's images to store, 0.2 or 20 (default: the replay CSVs, else 0.2)", type=rate)  # fmt: skip
    buffer_size: int | None = flag(
        None, DATA, "number of replay images in all, instead of --replay_rate", type=int_at_least(1)
    )
    replay_batch: float | None = flag(None, DATA, "least share of each batch that is stored images; 0 shuffles new and stored ones as one pool (default: the method's)", type=part_of_batch, metavar="SHARE")  # fmt: skip
    replay_selection: str = flag("random", DATA, "which images of a class are stored: at random, by iCaRL's herding, or rather those of high loss", choices=["random", "herding", "loss"])  # fmt: skip
    memory_budget: int | None = flag(None, DATA, "bytes of all that is kept between tasks, like 1MB; replay images take what the rest leaves", type=size, metavar="BYTES")  # fmt: skip
    replay_codec: str = flag("raw", DATA, "how replay images are stored", choices=["raw", "webp", "jpeg", "bits4"])
    replay_quality: int | None = flag(None, DATA, "quality of webp and jpeg, 1 to 100 (default: 50)", type=quality, metavar="Q")  # fmt: skip
    replay_code_new: bool | None = switch(None, DATA, "train on new images as the codec gives them back, too, so that coding does not tell which are stored (default: True with a codec)")  # fmt: skip

    method: str = flag(
        "ours", METHOD, "lifelong method; life_q means the quantizer proxq with the method of --ll_method"
    )
    ll_method: str | None = flag(None, METHOD, "lifelong method, for when --method names a quantizer")
    preset: str | None = flag(
        None,
        METHOD,
        "paper: ours to the letter of the paper; tuned: the best settings that a search found",
        choices=presets.names(),
    )
    balanced: bool | None = switch(None, METHOD, "False trains ours with plain cross entropy and uniform sampling")
    loss: str = flag("", METHOD, f"task loss: {', '.join(LOSSES)} (default: the method's)", choices=list(LOSSES),
                     metavar="LOSS")  # fmt: skip
    sampler: str = flag("", METHOD, "how to draw training images (default: the method's)", choices=["uniform", "ball"])
    penalty: str = flag("", METHOD, "penalty instead of the method's own, or none (default: the method's)")
    ll_lambda: float | None = flag(
        None, METHOD, "strength of the penalty (default: the penalty's own)", "--lambda", type=real(0)
    )
    importance_bits: int = flag(32, METHOD, "bits in which importances, and a method's anchors, are kept: float32, float16 or 8-bit codes", type=int, choices=[32, 16, 8])  # fmt: skip
    distill: float = flag(
        0.0, METHOD, "weight of the distillation from the former task's quantized model", type=real(0)
    )
    distill_temperature: float = flag(2.0, METHOD, "temperature of the distillation", type=real(above=0))
    ema: float = flag(
        0.0,
        METHOD,
        "decay of a moving average of the weights, like 0.99; the average is what is evaluated",
        type=below_one,
    )
    head_epochs: int = flag(
        0, METHOD, "class-balanced epochs that train the head alone at a task's end", type=int_at_least(0)
    )
    nme: bool = switch(False, METHOD, "also report the accuracy of the nearest mean of exemplars")

    arch: str = flag("resnet", QUANT, "family of networks; the network itself is --target_model", choices=["resnet"])
    target_model: str = flag("resnet20", QUANT, "network: resnet20, resnet56, or a classification model of torchvision by its name, like resnet18; the ending _quant may follow")  # fmt: skip
    source_model: str | None = flag(
        None, QUANT, "network of --source_file; it must be the same as --target_model", free=True
    )
    shortcut: str = flag(
        "A", QUANT, "A has no weights; conv is the authors' quantized 1x1 convolution", choices=["A", "conv"]
    )
    stem: str = flag("auto", QUANT, "first layers of torchvision's ResNets; cifar: a 3x3 convolution of stride 1 and no pooling; auto: cifar up to 64 pixels",
                     choices=["auto", "imagenet", "cifar"])  # fmt: skip
    quantizer: str = flag("", QUANT, "quantizer of the weights (default: proxq for ours, lsq for the others)")
    act_quantizer: str = flag("", QUANT, "quantizer of the activations (default: the same as the weights')")
    bitW: int = flag(4, QUANT, "bit-width of the weights", type=bit_width, choices=BIT_WIDTHS)
    abitW: int = flag(0, QUANT, "bit-width of the activations (default: --bitW)", type=bit_width, choices=BIT_WIDTHS)
    first_last_bits: int = flag(
        8,
        QUANT,
        "bit-width of the first and the last layer, where --bitW is below 32",
        type=bit_width,
        choices=BIT_WIDTHS,
    )
    layer_bits: str | None = flag(None, QUANT, "other bit-widths for some layers, weights/activations: layer3.*=8,fc=4/8",
                                  type=layer_bits, metavar="PATTERN=BITS")  # fmt: skip
    per_channel: bool = switch(
        False, QUANT, "learn one weight scale for each output channel instead of one for the tensor"
    )
    bit_schedule: tuple[int, ...] | None = flag(None, QUANT, "progressive bits, like 32,8,4,2: task 0 at each width, all tasks at the last", type=bits_list, metavar="BITS")  # fmt: skip
    bn_reestimate: int = flag(0, QUANT, "training batches from which to estimate BatchNorm's statistics anew at a task's end",
                              type=int_at_least(0), metavar="BATCHES")  # fmt: skip
    track_oscillations: bool = switch(
        False, QUANT, "report how many weights oscillate between two codes (Nagel et al. 2022)"
    )
    freeze_oscillating: float | None = flag(None, QUANT, "freeze weights that oscillate in more than this share of steps, like 0.02", type=below_one, metavar="SHARE")  # fmt: skip
    pretrained: bool | None = switch(
        None, QUANT, "start from --source_file (default: True if that is given)", free=True
    )
    source_dir: str = flag("", QUANT, "folder that contains --source_file", path=True)
    source_file: str | None = flag(None, QUANT, "model to start from: its file, a run's folder, or float weights of elsewhere (.pth, .safetensors)", path=True)  # fmt: skip
    source_weights: str | None = flag(
        None,
        QUANT,
        "pretrained weights of torchvision to start from, downloaded: DEFAULT, or a name like IMAGENET1K_V1",
    )

    num_epochs: int = flag(50, TRAIN, "number of epochs for each task", type=int_at_least(1))
    train_batch_size: int = flag(128, TRAIN, "images in a training step, stored ones included", type=int_at_least(2))
    eval_batch_size: int = flag(100, TRAIN, "images in a batch of the evaluation", type=int_at_least(1))
    lr: float = flag(0.04, TRAIN, "highest learning rate", type=real(above=0))
    step_lr: float = flag(0.1, TRAIN, "learning rate of the quantizers' scales, as a share of --lr", type=real(0))
    sched: str = flag("", TRAIN, "learning rate over a task (default: cosine, or multistep with --lr_decay_step[s])",
                      choices=["multistep", "cosine", "onecycle", "constant"])  # fmt: skip
    warmup_epochs: float = flag(0.0, TRAIN, "number of epochs of linear warm-up", type=real(0))
    lr_gamma: float = flag(0.1, TRAIN, "multistep: factor of the learning rate at each decay", type=real(above=0))
    lr_decay_step: int | None = flag(None, TRAIN, "multistep: epochs between two decays", type=int_at_least(1))
    lr_decay_steps: tuple[int, ...] | None = flag(None, TRAIN, "multistep: decay after these epochs, like 10,20 or 10 20",
                                                  nargs="+", type=epochs_list, metavar="EPOCH")  # fmt: skip
    optimizer: str = flag("sgd", TRAIN, "optimizer", choices=["sgd", "adam", "adamw"])
    momentum: float = flag(0.9, TRAIN, "momentum of sgd; adam and adamw do not use it", type=real(0))
    weight_decay: float = flag(1e-4, TRAIN, "weight decay; the quantizers' scales have none", type=real(0))
    seed: int = flag(0, TRAIN, "seed of everything random", type=int_at_least(0))

    job_dir: str = flag("", RUN, "folder for the run's files (default: experiment/<method>_<bitW>bit)", path=True)
    resume: str | None = flag(None, RUN, "continue the run in job_dir, or from the checkpoint PATH", nargs="?", const="True",
                              metavar="PATH", path=True)  # fmt: skip
    reset: bool = switch(False, RUN, "clear job_dir before the run", path=True)
    start_task: int = flag(
        0, RUN, "begin at this task, with the state that the run --from had there", type=int_at_least(0)
    )
    from_run: str | None = flag(
        None, RUN, "folder of the run that --start_task takes its state from", "--from", path=True
    )
    test_only: bool = switch(
        False, RUN, "only evaluate the model of job_dir or --source_file, with its run's settings", free=True
    )
    device: str = flag(
        "auto", RUN, "where to train; auto takes the GPU if there is one", choices=["auto", "cpu", "cuda"], free=True
    )
    gpus: int = flag(0, RUN, "index of the GPU to use", nargs="+", type=int_at_least(0), free=True)
    amp: str = flag("off", RUN, "bf16 trains convolutions in bfloat16, for GPUs and for CPUs that have it; quantizers stay in float32",
                    choices=["off", "bf16"])  # fmt: skip
    tf32: bool = switch(
        True,
        RUN,
        "training steps on a GPU round the inputs of convolutions and products to TF32, 10 bits of 23, which is faster; evaluation and importances never do",
    )
    deterministic: bool = switch(
        False, RUN, "use only deterministic algorithms, so that a GPU gives the same bits again"
    )
    compile: str = flag("auto", RUN, "torch.compile; auto compiles long runs", nargs="?", const="on",
                        choices=["auto", "on", "off"])  # fmt: skip
    checkpoint_seconds: float = flag(300.0, RUN, "seconds between two checkpoints", type=real(0), free=True)
    keep_checkpoints: str = flag("tasks", RUN, "what a finished run keeps: the state at each task's end, from which --from begins, or the last alone", choices=["tasks", "last"], free=True)  # fmt: skip
    on_nan: str = flag("stop", RUN, "what to do at a step that is NaN or infinite: stop at the state before it, or skip it", choices=["stop", "skip"], free=True)  # fmt: skip
    print_freq: int | None = flag(None, RUN, "steps between two readings of the loss (default: about 100 readings a task)", type=int_at_least(1), free=True)  # fmt: skip
    eval_every: int | None = flag(None, RUN, "epochs between two evaluations on the test images, for TensorBoard (default: about 20 points a run, fewer where they would add a twentieth to its work)", type=int_at_least(1), free=True)  # fmt: skip

    options: Mapping[str, Any] = field(default_factory=dict)

    def asdict(self, paths: bool = True) -> dict[str, Any]:
        """All settings, JSON-ready; ``paths=False`` leaves out what differs between machines and says nothing of the run."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata and (paths or not f.metadata["path"])}
        return {**{k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}, **self.options}

    def bits_of_layers(self) -> dict[str, tuple[int, int]]:
        """{pattern: (weight bits, activation bits)} of --layer_bits."""
        pairs = (part.strip().split("=") for part in (self.layer_bits or "").split(",") if part)
        widths = {pattern: [int(bits) for bits in value.split("/")] for pattern, value in pairs}
        return {pattern: (bits[0], bits[-1]) for pattern, bits in widths.items()}

    def option(self, owner: str, kind: str | None = None) -> dict[str, Any]:
        """The own flags of a method, penalty or quantizer, without its name before them.

        ``kind``: "method", "penalty" or "quantizer", for a name that is registered as more than one of these.
        """
        kinds = [kind] if kind else [k for k in ("method", "penalty", "quantizer") if owner in registry.names(k)]
        own = {name for k in kinds for name in registry.own_flags(k, owner)}
        return {name.removeprefix(owner + "_"): value for name, value in self.options.items() if name in own}


def free_names() -> set[str]:
    """Settings that may differ between a run and its resumption."""
    return {f.name for f in fields(Config) if f.metadata and f.metadata["free"]}
