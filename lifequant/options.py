"""The command line: every flag is a field of one frozen Config; spellings and aliases of the original live here only.

Two phases: the method and the quantizer are picked first, their own flags are added, then everything is parsed
strictly. What a flag defaults to may depend on the method, so ``resolve`` fills in what was not given.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lifequant import registry
from lifequant.cli import Parser, boolean, real, share, whole
from lifequant.errors import UserError, closest
from lifequant.losses import LOSSES
from lifequant.penalties import PENALTIES
from lifequant.quantizers.base import BIT_WIDTHS

LIFEQUANT_NAMES = ("life_q", "lifeq")  # the original's two spellings of its quantizer, after --method
PRESETS = {"paper": {"loss": "ball", "penalty": "proxq_paper", "ll_lambda": 100.0, "proxq_c": 3.0}}
REPLAY_RATE = 0.2  # the best of 10, 20 and 35 % in the paper
INERT = {  # the original's flags that have lost their meaning, and why
    "stage": "there is one stage",
    "refine": "a run starts from --source_file",
    "random": "--seed rules everything random",
    "keep_grad": "gradients through rounding are always straight through",
    "lam": "the penalty's strength is --ll_lambda",
    "lam2": "the penalty's strength is --ll_lambda",
    "act_range": "activation steps are set from data and learnt",
    "mask_step": "nothing is masked",
}


def flag(
    default: Any, group: str, help: str, *names: str, path: bool = False, free: bool = False, **kwargs: Any
) -> Any:
    """A field and its flag. ``path``: left out of results.json; ``free``: may change when a run is resumed."""
    meta = {"group": group, "help": help, "names": names, "path": path, "free": path or free, "kwargs": kwargs}
    return field(default=default, metadata=meta)


def switch(default: bool | None, group: str, help: str, **kwargs: Any) -> Any:
    """A true boolean: ``--flag``, ``--flag True``, ``--flag False``."""
    return flag(default, group, help, type=boolean, nargs="?", const=True, metavar="BOOL", **kwargs)


def epochs_list(text: str) -> list[int]:
    """``10,20`` -> [10, 20]."""
    return [whole(1)(part) for part in text.split(",") if part]


def rate(text: str) -> float:
    """A share, or 0 for none."""
    return 0.0 if text.strip() in ("0", "0.0") else share(text)


DATA, METHOD, QUANT, TRAIN, RUN = "data", "method and its parts", "model and quantizer", "training", "run"


@dataclass(frozen=True)
class Config:
    """Every setting of a run, resolved. ``options`` holds the method's and the quantizer's own flags."""

    csv_dir: str = flag("data/", DATA, "folder of the task CSVs", path=True)
    dataset: str | None = flag(None, DATA, "prefix of the task CSVs (default: the only one in csv_dir)")
    data_dir: str | None = flag(None, DATA, "image root (default: dataset.json's, else data_dir/<prefix>)", path=True)
    cache_dir: str | None = flag(
        None, DATA, "decoded images are kept here (default: the user's cache folder)", path=True
    )
    num_tasks: int | None = flag(None, DATA, "tasks to run (default: as many as there are CSVs)", type=whole(1))
    task_id: int | None = flag(None, DATA, "run this task alone", type=whole(0))
    num_classes: int | None = flag(None, DATA, "outputs of the head (default: as the data set has)", type=whole(2))
    image_size: int = flag(32, DATA, "images are scaled and cut to this many pixels a side", type=whole(8))
    lt_gamma: float = flag(1.0, DATA, "long tail: imbalance ratio of the training classes", type=real(1))
    val_fraction: float = flag(0.0, DATA, "share of the training images held out to choose an epoch", type=rate)
    replay_rate: float | None = flag(None, DATA, "share of each old task's images stored, 0.2 or 20; 0: none "
                                     "(default: the replay CSVs where present, else 0.2)", type=rate)  # fmt: skip
    buffer_size: int | None = flag(None, DATA, "replay images in all, instead of a rate", type=whole(1))

    method: str = flag("ours", METHOD, "lifelong method (or life_q: the quantizer proxq, the method by --ll_method)")
    ll_method: str | None = flag(None, METHOD, "lifelong method, where --method names a quantizer")
    preset: str | None = flag(None, METHOD, "paper: ours to the letter of the paper", choices=list(PRESETS))
    balanced: bool | None = switch(None, METHOD, "False: ours with plain cross entropy and uniform sampling")
    loss: str = flag("", METHOD, "task loss (default: the method's)", choices=list(LOSSES))
    sampler: str = flag(
        "", METHOD, "how training images are drawn (default: the method's)", choices=["uniform", "ball"]
    )
    penalty: str = flag("", METHOD, "penalty (default: the method's)", choices=["none", *PENALTIES])
    ll_lambda: float | None = flag(None, METHOD, "strength of the penalty (default: its own)", "--lambda", type=real(0))

    arch: str = flag("resnet", QUANT, "family of networks; the network itself is --target_model", choices=["resnet"])
    target_model: str = flag("resnet20", QUANT, "network: resnet20, resnet56 (a suffix _quant may follow)")
    source_model: str | None = flag(None, QUANT, "the source's network; it must be the target's", free=True)
    shortcut: str = flag("A", QUANT, "A: no weights; conv: the authors' quantized 1x1", choices=["A", "conv"])
    quantizer: str = flag("", QUANT, "quantizer (default: proxq for ours, lsq for the others)")
    bitW: int = flag(4, QUANT, "bits of the weights", type=int, choices=BIT_WIDTHS)
    abitW: int = flag(0, QUANT, "bits of the activations (default: bitW)", type=int, choices=BIT_WIDTHS)
    first_last_bits: int = flag(8, QUANT, "bits of the first and last layer below 32", type=int, choices=BIT_WIDTHS)
    pretrained: bool | None = switch(None, QUANT, "start from --source_file (default: where it is given)", free=True)
    source_dir: str = flag("", QUANT, "folder that --source_file is relative to", path=True)
    source_file: str | None = flag(None, QUANT, "a model to start from", path=True)

    num_epochs: int = flag(50, TRAIN, "epochs a task", type=whole(1))
    train_batch_size: int = flag(128, TRAIN, "images a step", type=whole(2))
    eval_batch_size: int = flag(100, TRAIN, "images a batch in evaluation", type=whole(1))
    lr: float = flag(0.04, TRAIN, "learning rate at its highest", type=real(above=0))
    step_lr: float = flag(0.1, TRAIN, "learning rate of step sizes, as a share of --lr", type=real(0))
    sched: str = flag("", TRAIN, "learning rate over a task (default: cosine; multistep where --lr_decay_step[s] is given)",
                      choices=["multistep", "cosine", "onecycle", "constant"])  # fmt: skip
    warmup_epochs: float = flag(0.0, TRAIN, "epochs of linear warm-up", type=real(0))
    lr_gamma: float = flag(0.1, TRAIN, "multistep: factor at each decay", type=real(above=0))
    lr_decay_step: int | None = flag(None, TRAIN, "multistep: decay every so many epochs", type=whole(1))
    lr_decay_steps: tuple[int, ...] | None = flag(None, TRAIN, "multistep: decay after these epochs, 10,20 or 10 20",
                                                  nargs="+", type=epochs_list, metavar="EPOCH")  # fmt: skip
    momentum: float = flag(0.9, TRAIN, "SGD's momentum", type=real(0))
    weight_decay: float = flag(1e-4, TRAIN, "weight decay (none on step sizes)", type=real(0))
    seed: int = flag(0, TRAIN, "rules everything random", type=whole(0))

    job_dir: str = flag("", RUN, "folder of the run (default: experiment/<method>_<bitW>bit)", path=True)
    resume: str | None = flag(None, RUN, "go on with the run in job_dir, or with a checkpoint", nargs="?", const="True",
                              metavar="PATH", path=True)  # fmt: skip
    reset: bool = switch(False, RUN, "clear job_dir first", path=True)
    start_task: int = flag(0, RUN, "begin at this task with the state of --from", type=whole(0))
    from_run: str | None = flag(None, RUN, "the run that --start_task takes its state from", "--from", path=True)
    test_only: bool = switch(False, RUN, "evaluate job_dir's model, or --source_file's; train nothing", free=True)
    device: str = flag("auto", RUN, "auto, cpu or cuda", choices=["auto", "cpu", "cuda"], free=True)
    gpus: int = flag(0, RUN, "index of the GPU, where there is one", nargs="+", type=whole(0), free=True)
    compile: str = flag("auto", RUN, "torch.compile: auto compiles long runs", nargs="?", const="on",
                        choices=["auto", "on", "off"])  # fmt: skip
    checkpoint_seconds: float = flag(300.0, RUN, "seconds between checkpoints", type=real(0), free=True)
    print_freq: int = flag(50, RUN, "steps between readings of the loss", type=whole(1), free=True)

    options: Mapping[str, Any] = field(default_factory=dict)

    def asdict(self, paths: bool = True) -> dict[str, Any]:
        """All settings, JSON-ready; ``paths=False`` leaves out what differs between machines and says nothing of the run."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata and (paths or not f.metadata["path"])}
        return {**{k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}, **self.options}

    def option(self, owner: str) -> dict[str, Any]:
        """The own flags of a method or quantizer, without its name before them."""
        return {k.removeprefix(owner + "_"): v for k, v in self.options.items() if k.startswith(owner + "_")}


def free_names() -> set[str]:
    """Settings that may differ between a run and its resumption."""
    return {f.name for f in fields(Config) if f.metadata and f.metadata["free"]}


def build_parser(method: str = "ours", quantizer: str = "proxq") -> tuple[Parser, list[str]]:
    """The parser with the flags of that method and quantizer, and the names of those flags."""
    parser = Parser(
        prog="lifequant",
        description="Train a quantized network on one task after another.",
        argument_default=argparse.SUPPRESS,
    )
    groups = {name: parser.add_argument_group(name) for name in (DATA, METHOD, QUANT, TRAIN, RUN)}
    for f in fields(Config):
        if not f.metadata:
            continue
        group = groups[f.metadata["group"]]
        text = f.metadata["help"]
        if "default" not in text and f.default not in (None, ""):
            text += f" (default: {f.default})"
        flags = f.metadata["names"] if f.name == "from_run" else ("--" + f.name, *f.metadata["names"])
        group.add_argument(*flags, dest=f.name, help=text, **f.metadata["kwargs"])
    inert = parser.add_argument_group("accepted from the original, without effect")
    for name, reason in INERT.items():
        inert.add_argument("--" + name, nargs="*", help=reason)
    own: list[str] = []
    for kind, name, thing in (
        ("method", method, registry.method(method)),
        ("quantizer", quantizer, registry.quantizer_class(quantizer)),
    ):
        group = parser.add_argument_group(f"{kind} {name}")
        thing.add_args(group)
        for action in group._group_actions:
            if action.default is argparse.SUPPRESS:  # own flags are few, and always there
                action.default = False if action.const is True else None
            own.append(action.dest)
    return parser, own


def _method_and_quantizer(given: dict[str, Any]) -> tuple[str, str]:
    """The lifelong method and the quantizer, however typed."""
    typed, ll_method, quantizer = given.get("method", "ours"), given.get("ll_method"), given.get("quantizer")
    known = registry.names("method")
    as_quantizer = "proxq" if typed in LIFEQUANT_NAMES else typed if typed in registry.names("quantizer") else None
    if as_quantizer:
        if ll_method is None and typed not in LIFEQUANT_NAMES:
            raise UserError(
                f"--method {typed} names a quantizer: name the lifelong method by --ll_method ({', '.join(known)})"
            )
        if quantizer not in (None, as_quantizer):
            raise UserError(f"--method {typed} and --quantizer {quantizer} name two quantizers: leave one out")
        quantizer, method = as_quantizer, ll_method or "ours"
    else:
        method = typed
        if ll_method not in (None, typed):
            raise UserError(f"--method {typed} and --ll_method {ll_method} name two lifelong methods: leave one out")
    if method not in known:
        names = [*known, *registry.names("quantizer"), *LIFEQUANT_NAMES]
        raise UserError(f"unknown method {method!r}{closest(method, names)} (known: {', '.join(known)})")
    quantizer = quantizer or registry.method(method).parts["quantizer"]
    registry.quantizer_class(quantizer)
    return method, quantizer


def parse(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """The Config of a command line, and the lines that should be said once (flags without effect, what was understood)."""
    first = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for name in ("method", "ll_method", "quantizer"):
        first.add_argument("--" + name)
    method, quantizer = _method_and_quantizer(vars(first.parse_known_args(list(argv))[0]))
    parser, own = build_parser(method, quantizer)
    given = vars(parser.parse_args(list(argv)))
    notes = [f"--{name} has no effect: {reason}" for name, reason in INERT.items() if given.pop(name, None) is not None]
    options = {name: given.pop(name) for name in own}
    config = resolve({**given, "method": method, "quantizer": quantizer}, options, notes)
    return config, notes


def make(**settings: Any) -> Config:
    """A Config from Python: ``make(method="ours", bitW=4, csv_dir=...)``, checked as the command line is; None is not given."""
    argv: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        values = [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
        argv += ["--from" if name == "from_run" else "--" + name, *values]
    return parse(argv)[0]


def resolve(given: dict[str, Any], options: dict[str, Any], notes: list[str]) -> Config:
    """Fill in what depends on something else; appends to ``notes``."""
    given = dict(given)
    parts = dict(registry.method(given["method"]).parts)
    if given.get("preset"):
        if given["method"] != "ours":
            raise UserError(f"--preset {given['preset']} is a preset of --method ours, not of {given['method']}")
        for name, value in PRESETS[given["preset"]].items():
            if name in {f.name for f in fields(Config)}:
                given.setdefault(name, value)
            elif options.get(name, value) is None:  # a quantizer's own flag that was not typed
                options[name] = value
    if given.get("balanced") is False:
        parts |= {"loss": "ce", "sampler": "uniform"}
    elif given.get("balanced") and given["method"] != "ours":
        notes.append(f"--balanced has no effect on {given['method']}: choose --loss and --sampler")
    for name in ("loss", "sampler", "penalty"):
        given.setdefault(name, parts[name])
    if given["penalty"] != "none":
        given.setdefault("ll_lambda", PENALTIES[given["penalty"]].default_lambda)
    given.setdefault("ll_lambda", parts.get("ll_lambda", 0.0))
    if not parts["replay"]:
        given["replay_rate"], given["buffer_size"] = 0.0, None
    given["ll_method"] = given["method"]
    given["target_model"] = given.get("target_model", "resnet20").removesuffix("_quant")
    registry.model(given["target_model"])
    if given.get("source_model", given["target_model"]).removesuffix("_quant") != given["target_model"]:
        raise UserError(f"--source_model {given['source_model']} does not fit --target_model {given['target_model']}")
    given.setdefault("abitW", given.get("bitW", 4))
    given.setdefault("pretrained", given.get("source_file") is not None)
    if given["pretrained"] and not given.get("source_file"):
        raise UserError("--pretrained True needs --source_file, the model to start from")
    if given.get("lr_decay_steps"):
        given["lr_decay_steps"] = tuple(epoch for part in given["lr_decay_steps"] for epoch in part)
    steps = given.get("lr_decay_step") or given.get("lr_decay_steps")
    given.setdefault("sched", "multistep" if steps else "cosine")
    if isinstance(given.get("gpus"), list):
        if len(given["gpus"]) > 1:
            notes.append(f"--gpus: one process uses one GPU, the first named ({given['gpus'][0]})")
        given["gpus"] = given["gpus"][0]
    if bool(given.get("start_task")) != bool(given.get("from_run")):
        raise UserError(
            "--start_task T and --from RUN go together: the task to begin at, the run to take its state from"
        )
    if given.get("resume") and given["resume"].lower() in ("false", "no"):
        given["resume"] = None
    given.setdefault("job_dir", str(Path("experiment") / f"{given['method']}_{given.get('bitW', 4)}bit"))
    return Config(**given, options=options)
