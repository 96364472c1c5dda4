"""The command line -> one frozen Config; spellings and aliases of the original live here only.

Two phases: the method and the quantizer are picked first, their own flags are added, then everything is parsed
strictly. What a flag defaults to may depend on the method, so ``resolve`` fills in what was not given.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lifequant import presets, registry
from lifequant.common.arguments import FALSE, TRUE, Parser
from lifequant.common.errors import UserError
from lifequant.config import DATA, METHOD, QUANT, REFERENCE_CROP_SCALE, RESUME_JOB_DIR, RUN, TRAIN, Config
from lifequant.models import torchvision_models

LIFEQUANT_NAMES = ("life_q", "lifeq")  # the original's two spellings of its quantizer, after --method
CHOSEN_FIRST = ("method", "penalty", "quantizer", "act_quantizer")  # before their own flags are known
INERT = {  # the original's flags that have lost their meaning, and why
    "stage": "there is one stage",
    "refine": "a run starts from --source_file",
    "random": "--seed rules everything random",
    "keep_grad": "gradients through rounding are always straight through",
    "lam": "the penalty's strength is --ll_lambda",
    "lam2": "the penalty's strength is --ll_lambda",
    "act_range": "activation steps are set from data and learned",
    "mask_step": "nothing is masked",
}


def build_parser(method: str = "ours", *quantizers: str, penalty: str = "proxq") -> tuple[Parser, list[str]]:
    """The parser with the flags of that method, that penalty and those quantizers, and the names of those flags."""
    parser = Parser(
        prog="lifequant",
        usage="lifequant train [FLAGS]",
        description="Train a quantized network on one task after another.",
        epilog="Other methods, penalties and quantizers have flags of their own: lifequant train --method ewc --help has those "
        "of ewc. lifequant list prints all names.",
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
    groups[RUN].add_argument("--list", action="store_true", help="print methods, quantizers, models and presets")
    inert = parser.add_argument_group("accepted from the original, without effect")
    for name, reason in INERT.items():
        inert.add_argument("--" + name, nargs="*", help=reason)
    own: list[str] = []
    things = [("method", method, registry.method(method))]
    things += [("penalty", penalty, registry.penalty(penalty))] if penalty != "none" else []
    things += [("quantizer", name, registry.quantizer_class(name)) for name in dict.fromkeys(quantizers or ["proxq"])]
    for kind, name, thing in things:
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
    typed, ll_method = registry.canonical("method", typed), ll_method and registry.canonical("method", ll_method)
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
        raise registry.unknown("method", method, [*registry.names("quantizer"), *LIFEQUANT_NAMES])
    quantizer = quantizer or registry.method(method).defaults["quantizer"]
    registry.quantizer_class(quantizer)
    return method, quantizer


def _refuse_anothers(argv: Sequence[str], parser: Parser, chosen: dict[str, str]) -> None:
    """Raises UserError for an own flag of a method or quantizer that this run does not use."""
    for flag in (word.split("=", 1)[0] for word in argv if word.startswith("--")):
        for kind in chosen if flag not in parser._option_string_actions else ():
            for name in (name for name in registry.names(kind) if flag.startswith(f"--{name}_")):
                if flag.removeprefix("--") in registry.own_flags(kind, name):
                    raise UserError(
                        f"{flag} is a flag of the {kind} {name}, this run's is {chosen[kind]}: leave it out"
                    )


def parse(argv: Sequence[str]) -> tuple[Config, list[str]]:
    """The Config of a command line, and the lines that should be said once (flags without effect, what was understood)."""
    first = Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for name in (*CHOSEN_FIRST, "ll_method"):
        first.add_argument("--" + name)
    for name in ("preset", "bitW", "bit_schedule"):
        first.add_argument("--" + name)
    typed = vars(first.parse_known_args(list(argv))[0])
    if typed.get("preset") in presets.names():
        of_preset = preset_of(typed)
        typed = {name: of_preset[name] for name in CHOSEN_FIRST if name in of_preset} | typed
    method, quantizer = _method_and_quantizer(typed)
    act_quantizer = typed.get("act_quantizer") or quantizer
    penalty = typed.get("penalty") or registry.method(method).defaults["penalty"]
    parser, own = build_parser(method, quantizer, act_quantizer, penalty=penalty)
    _refuse_anothers(argv, parser, {"method": method, "penalty": penalty, "quantizer": quantizer})
    given = vars(parser.parse_args(list(argv)))
    notes = [f"--{name} has no effect: {reason}" for name, reason in INERT.items() if given.pop(name, None) is not None]
    options = {name: given.pop(name) for name in own}
    config = resolve(
        {**given, "method": method, "quantizer": quantizer, "act_quantizer": act_quantizer}, options, notes
    )
    return config, notes


def typed(argv: Sequence[str]) -> set[str]:
    """Names of the settings that a command line gives."""
    words = {word.split("=", 1)[0] for word in argv}
    return {f.name for f in fields(Config) if f.metadata and words & {f"--{f.name}", *f.metadata["names"]}}


def make(**settings: Any) -> Config:
    """A Config from Python: ``make(method="ours", bitW=4, csv_dir=...)``, checked as the command line is; None is not given."""
    argv: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        values = [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
        argv += ["--from" if name == "from_run" else "--" + name, *values]
    return parse(argv)[0]


def preset_of(given: dict[str, Any]) -> dict[str, Any]:
    """The flags of --preset at the weights' bit-width, however far what was typed has been parsed."""
    schedule = given.get("bit_schedule") or (given.get("bitW", 4),)
    last = str((schedule.split(",") if isinstance(schedule, str) else schedule)[-1])
    return presets.settings(given["preset"], int(last) if last.isdigit() else 4)


def _check_network(given: dict[str, Any]) -> None:
    """Raises UserError for a network that is not known, and for a flag or a source that it does not have."""
    name = given["target_model"]
    if name in registry.names("model"):
        for flag, value in (("stem", "auto"), ("source_weights", None)):
            if given.get(flag, value) != value:
                raise UserError(f"--{flag} is for torchvision's models, and {name} is none: leave it out")
        return
    if name not in (known := torchvision_models.names()):
        raise registry.unknown("model", name, known)
    if given.get("shortcut", "A") != "A":
        raise UserError(f"--shortcut {given['shortcut']} is for resnet20 and resnet56: leave it out")
    if given.get("source_weights"):
        torchvision_models.weights_of(name, given["source_weights"])


def resolve(given: dict[str, Any], options: dict[str, Any], notes: list[str]) -> Config:
    """Fill in what depends on something else; appends to ``notes``."""
    given = dict(given)
    defaults = dict(registry.method(given["method"]).defaults)
    if given.get("preset"):
        for name, value in preset_of(given).items():
            if name in {f.name for f in fields(Config)}:
                given.setdefault(name, value)
            elif options.get(name, value) is None:  # a method's or quantizer's own flag that was not typed
                options[name] = value
        if given["method"] != (method := preset_of(given)["method"]):
            raise UserError(f"--preset {given['preset']} is a preset of --method {method}, not of {given['method']}")
    if given.get("balanced") is False:
        defaults |= {"loss": "ce", "sampler": "uniform"}
    elif given.get("balanced") and given["method"] != "ours":
        notes.append(f"--balanced has no effect on {given['method']}: choose --loss and --sampler")
    for name in ("loss", "sampler", "penalty"):
        given.setdefault(name, defaults[name])
    if given["penalty"] != "none":
        given.setdefault("ll_lambda", registry.penalty(given["penalty"]).default_lambda)
    given.setdefault("ll_lambda", defaults.get("ll_lambda", 0.0))
    if not defaults["replay"] and given.get("buffer_size") is None:
        given.setdefault("replay_rate", 0.0)
    if given.get("buffer_size") is not None and given.get("replay_rate") is not None:
        raise UserError("--buffer_size and --replay_rate both say how many images to store: leave one out")
    keeping = registry.method(given["method"]) if given["penalty"] == "none" else registry.penalty(given["penalty"])
    if given.get("importance_bits", 32) != 32 and not keeping.keeps_importances:
        raise UserError(
            f"--importance_bits: {given['method']} with the penalty {given['penalty']} keeps no importances"
        )
    if given.get("augment") == "reference":
        given.setdefault("crop_scale", REFERENCE_CROP_SCALE)
        if given.get("cache") == "mmap":
            raise UserError(
                "--cache mmap: its file has images of one size, and --augment reference takes parts of whole photographs: use encoded or auto"
            )
    stores = given.get("replay_rate") != 0 or given.get("buffer_size") is not None
    for name in ("nme", "replay_batch", "replay_selection", "replay_codec"):
        if given.get(name) not in (None, False, 0, "random", "raw") and not stores:
            raise UserError(
                f"--{name} needs stored images, and {given['method']} stores none: give --replay_rate or --buffer_size"
            )
    given.setdefault("replay_batch", defaults.get("replay_batch", 0.0) if stores else 0.0)
    codec = given.setdefault("replay_codec", "raw")
    for name in ("replay_quality", "replay_code_new"):
        if given.get(name) and (codec == "raw" or (name == "replay_quality" and codec == "bits4")):
            raise UserError(f"--{name} has no meaning with --replay_codec {codec}: leave it out, or name webp or jpeg")
    if codec != "raw" and given.get("augment") == "reference":
        raise UserError(
            f"--replay_codec {codec} codes images of one size, and --augment reference takes parts of whole photographs"
        )
    given.setdefault("replay_quality", 50 if codec in ("webp", "jpeg") else None)
    given.setdefault("replay_code_new", codec != "raw")
    given["ll_method"] = given["method"]
    given["target_model"] = given.get("target_model", "resnet20").removesuffix("_quant")
    _check_network(given)
    if given.get("source_model", given["target_model"]).removesuffix("_quant") != given["target_model"]:
        raise UserError(f"--source_model {given['source_model']} does not fit --target_model {given['target_model']}")
    if given.get("bit_schedule"):
        last = given["bit_schedule"][-1]
        if given.setdefault("bitW", last) != last:
            raise UserError(f"--bitW {given['bitW']} and --bit_schedule, which ends at {last} bits: leave --bitW out")
        for name in ("start_task", "test_only", "task_id"):
            if given.get(name):
                raise UserError(f"--{name} and --bit_schedule: give it to a run in the folder of one rung")
    given.setdefault("abitW", given.get("bitW", 4))
    sources = [name for name in ("source_file", "source_weights") if given.get(name)]
    if len(sources) > 1:
        raise UserError("--source_file and --source_weights both name the model to start from: leave one out")
    given.setdefault("pretrained", bool(sources))
    if given["pretrained"] and not sources:
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
    if given.get("resume") and given["resume"].lower() in TRUE + FALSE:
        given["resume"] = RESUME_JOB_DIR if given["resume"].lower() in TRUE else None
    given.setdefault("job_dir", str(Path("experiment") / f"{given['method']}_{given.get('bitW', 4)}bit"))
    return Config(**given, options=options)
