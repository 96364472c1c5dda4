"""Files that others wrote: they run nothing, take no memory that they haven't, and are refused in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import arguments, settings, train

import lifequant
from lifequant.__main__ import train as command
from lifequant.checkpointing import checkpoint
from lifequant.common.arguments import run_main
from lifequant.common.errors import UserError

PACKAGE = Path(lifequant.__file__).parent
HUGE = 10**9


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> dict[str, Path]:
    """Runs of three methods; with last.pt as at the end of the first task, so that there is something to go on with."""
    made = {}
    for method in ("ours", "si", "derpp"):
        job = made[method] = tmp_path_factory.mktemp("runs") / method
        train(tiny, job, method=method)
        for name in ("results.json", "model_best.pt"):
            shutil.copy(job / name, job.parent / f"{method}_{name}")
    return made


def one_line(argv: list[str], capsys, code: int = 2) -> str:
    assert run_main(command, argv) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("lifequant: error: ") and len(error) < 1000, error[:2000]
    return error


def resume(tiny, run: Path, folder: Path, state: Any, capsys, method: str = "ours") -> str:
    """Go on in a copy of the run with ``state`` as its last checkpoint."""
    job = folder / "job"
    shutil.rmtree(job, ignore_errors=True)
    shutil.copytree(run, job)
    (job / "checkpoint" / "previous.pt").unlink(missing_ok=True)
    if isinstance(state, bytes):
        (job / "checkpoint" / "last.pt").write_bytes(state)
    else:
        checkpoint.write(job / "checkpoint" / "last.pt", state)
    return one_line(arguments(settings(tiny, job, method=method, resume=True)), capsys)


def hostile(kind: str, mark: Path) -> bytes:
    """A pickle's bytes, with a payload: of plain pickle, of torch's former format, of its archive, of our own writer."""
    if kind == "pickle":
        return pickle.dumps({"schema": 1, "kind": "run", "x": Payload(mark)})
    state = {"kind": "run", "x": Payload(mark)}
    if kind == "ours":
        return bytes(checkpoint.content(state))
    buffer = io.BytesIO()
    torch.save({"schema": 1, **state}, buffer, _use_new_zipfile_serialization=kind == "archive")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["pickle", "legacy", "archive", "ours"])
def test_pickles_run_nothing(kind, tiny, runs, tmp_path, monkeypatch, capsys):
    """As --source_file, --resume, --from, --test_only's model, lifequant.load; the payload is real."""
    mark = tmp_path / "it_ran"
    content = hostile(kind, mark)
    path = tmp_path / "model_best.pt"
    path.write_bytes(content)
    job = tmp_path / "new"
    for flags in ({"source_file": path}, {"source_file": path, "test_only": True}, {"resume": path}):
        one_line(arguments(settings(tiny, job, **flags)), capsys)
    (tmp_path / "run" / "checkpoint").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint" / "task0.pt").write_bytes(content)
    one_line(arguments(settings(tiny, job, start_task=1, **{"from": tmp_path / "run"})), capsys)
    resume(tiny, runs["ours"], tmp_path, content, capsys)
    with pytest.raises(UserError):
        lifequant.load(path)
    assert not mark.exists() and not job.exists()
    if kind == "pickle":
        pickle.loads(content)
        assert mark.exists()  # it would have


def test_cached_pixels_run_nothing(tiny, tmp_path, capsys):
    """An array of objects in place of decoded images: read anew, or refused; never unpickled."""
    mark, cache = tmp_path / "it_ran", tmp_path / "cache"
    flags = {"cache_dir": cache, "method": "original", "num_tasks": 1}
    train(tiny, tmp_path / "first", **flags)
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert files
    buffer = io.BytesIO()
    np.save(buffer, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    for content in (buffer.getvalue(), hostile("archive", mark), hostile("pickle", mark)):
        for path in files:
            path.write_bytes(content)
        assert run_main(command, arguments(settings(tiny, tmp_path / "second", reset=True, **flags))) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err and not mark.exists()


def test_source_has_no_other_door():
    """Every torch.load is weights_only, and nothing evaluates text or unpickles, but the CIFAR archive's closed reader."""
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "scripts").glob("*.py")]:
        text = path.read_text()
        assert text.count("torch.load(") == text.count("weights_only=True") - text.count("(weights_only=True"), path
        for word in (" eval(", "=eval(", " exec(", "allow_pickle=True", "pickle.load", "weights_only=False"):
            assert word not in text, (path, word)
        assert path.name == "cifar.py" or "import pickle" not in text


@pytest.mark.parametrize("method", ["ours", "si", "derpp"])
def test_each_part_of_a_run(method, tiny, runs, tmp_path, capsys):
    """last.pt without a part, or with a tensor of another shape in one, is refused by name before the run begins."""
    whole = checkpoint.read(runs[method] / "checkpoint" / "task0.pt", "run")
    for name in ("data_key", "task_index", "model", "optimizer", "method", "history", "sums", "limited_updates"):
        state = {key: value for key, value in whole.items() if key != name}
        if name in ("optimizer", "method"):
            state[name] = {"something": 3}
        error = resume(tiny, runs[method], tmp_path, state, capsys, method)
        assert "last.pt" in error and (name in error or name == "data_key"), error
    state = {**whole, "model": {**whole["model"], "fc.weight": torch.zeros(3, 64)}}
    error = resume(tiny, runs[method], tmp_path, state, capsys, method)
    assert "fc.weight is [3, 64]" in error and "[6, 64]" in error
    error = resume(tiny, runs[method], tmp_path, {**whole, "sums": torch.zeros(2)}, capsys, method)
    assert "does not fit" in error


def test_another_schema(tiny, runs, tmp_path, monkeypatch, capsys):
    whole = checkpoint.read(runs["ours"] / "checkpoint" / "task0.pt", "run")
    monkeypatch.setattr(checkpoint, "SCHEMA", 99)
    error = resume(tiny, runs["ours"], tmp_path, whole, capsys)
    assert "another version of LifeQuant" in error


def test_memory_stays_small(runs):
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 6e6  # kB; one tensor above would have taken 40 GB


WRONG_CONFIG = [
    {"bitW": "x"}, {"bitW": HUGE}, {"bitW": 7}, {"target_model": "resnet1000000"}, {"target_model": "../x"},
    {"quantizer": "os.system"}, {"quantizer": {"a": 1}}, {"act_quantizer": "none"}, {"layer_bits": "fc=1000000"},
    {"per_channel": "maybe"}, {"seed": -1}, {"first_last_bits": 10**9}, {"shortcut": "D"}, {"image_size": "a" * 10**6},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_CONFIG, ids=lambda wrong: str(wrong)[:40])
def test_config_of_a_model(wrong, runs, tmp_path):
    state = checkpoint.read(runs["ours"] / "model_best.pt", "model")
    state["config"] |= wrong
    _refused(state, tmp_path)


@pytest.mark.parametrize("key", ["config", "options", "class_names", "preprocessing", "model"])
def test_each_part_of_a_model(key, runs, tmp_path):
    whole = checkpoint.read(runs["ours"] / "model_best.pt", "model")
    _refused({name: value for name, value in whole.items() if name != key}, tmp_path)
    for bad in (None, 3, [[]]):
        _refused({**whole, key: bad}, tmp_path)
    _refused({**whole, "class_names": [str(i) for i in range(10**4)]}, tmp_path)
    _refused({**whole, "preprocessing": {"image_size": 10**9}}, tmp_path)


def test_weights_of_a_model(tiny, runs, tmp_path, capsys):
    whole = checkpoint.read(runs["ours"] / "model_best.pt", "model")
    name = "fc.weight"
    weight = whole["model"][name]
    for bad in (
        weight.double(),
        weight.T.contiguous(),
        None,
        torch.zeros(1).expand(10**5, 10**5),
        weight * float("nan"),
    ):
        state = {**whole, "model": {**whole["model"], name: bad}}
        if not (
            torch.is_tensor(bad) and bad.shape == weight.shape and bad.dtype == weight.dtype
        ):  # a NaN can be looked at
            _refused(state, tmp_path)
        checkpoint.write(tmp_path / "model.pt", state)
        one_line(arguments(settings(tiny, tmp_path / "job", source_file=tmp_path / "model.pt")), capsys)


def test_options_of_a_model(runs, tmp_path):
    """A quantizer's own flags are checked as on the command line."""
    whole = checkpoint.read(runs["ours"] / "model_best.pt", "model")
    _refused({**whole, "options": {**whole["options"], "proxq_c": -1.0}}, tmp_path)
    _refused({**whole, "options": {**whole["options"], "proxq_c": [[]]}}, tmp_path)


def _refused(state: dict[str, Any], folder: Path) -> None:
    checkpoint.write(folder / "model.pt", state)
    with pytest.raises(UserError) as error:
        lifequant.load(folder / "model.pt")
    assert len(str(error.value)) < 1000 and "model.pt" in str(error.value)


def test_compressed_archive(runs, tmp_path):
    """A zip bomb is refused by its directory."""
    with (
        zipfile.ZipFile(runs["ours"] / "model_best.pt") as source,
        zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(UserError):
        lifequant.load(tmp_path / "model.pt")


RESULTS = {
    "text": b"text", "deep": b"[" * 200_000, "deep and closed": b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "list": b"[]",
    "null": b"null", "NaN": b'{"schema": 1, "top1": NaN}', "long text": b'"' + b"x" * 10_000_000 + b'"', "binary": bytes(range(256)),
    "huge number": b'{"schema": ' + b"9" * 10_000 + b"}", "another schema": b'{"schema": 99}', "empty": b"",
}  # fmt: skip


@pytest.mark.parametrize("content", RESULTS.values(), ids=list(RESULTS))
def test_results_of_a_finished_run(content, tiny, runs, tmp_path, capsys):
    """A finished run is resumed: its results.json is printed only if it is one."""
    job = shutil.copytree(runs["ours"], tmp_path / "job")
    (job / "results.json").write_bytes(content)
    error = one_line(arguments(settings(tiny, job, method="ours", resume=True)), capsys)
    assert "results.json" in error


@pytest.mark.parametrize(
    "key", ["schema", "config", "tasks", "top1", "top1_masked", "memory_bytes", "average_accuracy", "bwt"]
)
def test_each_part_of_results(key, tiny, runs, tmp_path, capsys):
    job = shutil.copytree(runs["ours"], tmp_path / "job")
    found = json.loads((job / "results.json").read_text())
    for bad in ("\x1b[2J" * 100_000, {"a": {}}, [[None]], True):
        (job / "results.json").write_text(json.dumps({**found, key: bad}))
        assert "results.json" in one_line(arguments(settings(tiny, job, method="ours", resume=True)), capsys)
