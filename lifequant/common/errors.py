"""The one exception that stands for a user's mistake, and the name that was meant by a mistyped one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

OTHER_NAMES = {  # the flag's name here: what other projects call it
    "abitW": "abits a_bits act_bits activation_bits bits_a",
    "amp": "bf16 fp16 half mixed_precision",
    "bitW": "bits bit bit_width bitwidth n_bits num_bits nbits w_bits wbits weight_bits bits_w",
    "buffer_size": "buffer memory memory_size mem_size n_memories",
    "csv_dir": "csv csvs csv_path",
    "data_dir": "data data_path data_root dataset_dir dataset_path image_dir image_root root",
    "device": "cuda",
    "eval_batch_size": "test_batch_size val_batch_size",
    "gpus": "gpu gpu_id gpu_ids",
    "image_size": "img_size input_size resolution",
    "job_dir": "exp_dir log_dir logdir out output output_dir save_dir work_dir",
    "ll_lambda": "ewc_lambda lamb reg_lambda reg_strength",
    "lr": "base_lr learning_rate",
    "lr_decay_steps": "milestones",
    "method": "algorithm approach cl_method strategy",
    "num_classes": "classes n_classes nb_classes",
    "num_epochs": "epoch epochs max_epochs n_epochs nb_epochs",
    "num_tasks": "n_experiences n_tasks nb_tasks tasks",
    "optimizer": "opt optim",
    "print_freq": "log_freq log_interval",
    "sched": "lr_schedule lr_scheduler scheduler",
    "seed": "manual_seed random_seed",
    "source_file": "pretrained_model pretrained_path weights",
    "target_model": "backbone model net network",
    "test_only": "eval eval_only evaluate test",
    "train_batch_size": "b batch batch_size batchsize bs minibatch_size",
    "val_fraction": "val_ratio val_split validation_split",
    "warmup_epochs": "warmup",
    "weight_decay": "wd",
}
_MEANT = {other: name for name, others in OTHER_NAMES.items() for other in others.split()}


class UserError(Exception):
    """Bad input. Its message is one line: what is wrong, where, and what to do. The command line prints it and exits 2."""


def closest(name: str, known: Iterable[str], most: int = 1) -> str:
    """``"; did you mean 'x'?"`` for the known name nearest to ``name``, or for the ``most`` nearest; empty if none is near.

    Case, dashes and underscores count little: ``LSQ`` is near to ``lsq``, and ``-num-tasks`` to ``--num_tasks``.
    """
    plain = {_plain(one): one for one in known}
    near = difflib.get_close_matches(_plain(name), list(plain), n=most)
    return f"; did you mean {' or '.join(repr(plain[one]) for one in near)}?" if near else ""


def closest_flag(flag: str, known: Iterable[str]) -> str:
    """The same for a flag, or what a flag of that name in other projects is called here."""
    known = list(known)
    meant = "--" + _MEANT.get(_plain(flag), "")
    return f"; here it is called {meant}" if meant in known else closest(flag, known)


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_").lower()


def one_line(text: object) -> str:
    """``text`` on one line that is safe to print: control characters and what isn't UTF-8 become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in str(text))
