"""Tasks that are domains: images made for them, a run's results and tables, a report, a grid, and what BaLL and ProxQ do."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.small_tasks import network
from support.tiny import Tiny, train
from test_archives import as_tar, office

from lifequant import options, registry
from lifequant.__main__ import train as command
from lifequant.common.arguments import run_main
from lifequant.common.errors import UserError
from lifequant.common.seeding import generator
from lifequant.data import dataset_json
from lifequant.data.create.images import main_prepare
from lifequant.data.create.tasks import main_tasks
from lifequant.data.replay import epoch_order
from lifequant.data.task import Task
from lifequant.data.task_csv import read_rows
from lifequant.experiments import grid, report
from lifequant.experiments.grid_tasks import write_tasks
from lifequant.losses import LOSSES

MADE = ["clean", "grey", "blur", "noise"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Ten classes as a stand-in for CIFAR-10: smooth random images."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for side, n in (("train", 3), ("test", 2)):
        for label in range(10):
            (root / side / f"class{label}").mkdir(parents=True)
            for number in range(n):
                small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                small.resize((32, 32), Image.Resampling.BICUBIC).save(root / side / f"class{label}" / f"{number}.png")
    return root


def prepared(out, *more) -> int:
    return run_main(main_prepare, ["--dataset", "cifar10", "--out", str(out), *map(str, more)])


def pixels(path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "RGB" and image.size == (32, 32)
        return np.asarray(image).astype(np.float64)


def test_made_of_images(photos, tmp_path, capsys):
    """Against numpy and scipy: luminance, a Gaussian blur of 2 pixels, noise of 40 levels."""
    ndimage = pytest.importorskip("scipy.ndimage")
    out = tmp_path / "out"
    assert prepared(out, "--source", photos, "--domains", ",".join(MADE)) == 0
    assert "noise/test: 20 images, 10 classes, 2 images a class" in capsys.readouterr().out
    noise = []
    for side, n in (("train", 3), ("test", 2)):
        for label in range(10):
            for number in range(n):
                image = pixels(photos / side / f"class{label}" / f"{number}.png")
                made = {d: pixels(out / d / side / f"class{label}" / f"{number + 1:04d}.png") for d in MADE}
                assert np.array_equal(made["clean"], image)
                luminance = image @ [0.299, 0.587, 0.114]
                assert np.abs(made["grey"] - luminance[..., None]).max() <= 1
                blurred = ndimage.gaussian_filter(image, (2, 2, 0), mode="nearest")
                middle = np.s_[8:-8, 8:-8]  # Pillow goes on with the border in another way
                assert np.abs(made["blur"] - blurred)[middle].max() < 4 < 15 < np.abs(image - blurred)[middle].max()
                inner = (image > 128 - 8) & (image < 128 + 8)  # where hardly any noise is cut off
                noise.append((made["noise"] - image)[inner])
    noise = np.concatenate(noise)
    assert len(noise) > 3000 and abs(noise.mean()) < 3 and noise.std() == pytest.approx(40, rel=0.05)
    assert prepared(out, "--source", photos, "--domains", ",".join(MADE)) == 0
    assert prepared(out, "--domains", "noise,blur,grey,clean") == 0  # complete, so that no source is needed
    assert capsys.readouterr().out.count("complete already") == 2
    turned = shutil.copytree(photos, tmp_path / "turned")
    shutil.copy(photos / "test" / "class1" / "0.png", turned / "test" / "class1" / "1.png")
    assert prepared(out, "--source", turned, "--domains", ",".join(MADE)) == 2
    assert "begun with other images" in capsys.readouterr().err


def test_noise_goes_by_seed_and_path(photos, tmp_path):
    """An image's noise is the same whatever the other domains are, and another one with another seed."""
    for name, domains, seed in (("a", "noise,clean", 0), ("b", "noise", 0), ("c", "noise", 1)):
        assert prepared(tmp_path / name, "--source", photos, "--domains", domains, "--seed", seed) == 0
    a, b, c = (pixels(tmp_path / name / "noise" / "train" / "class3" / "0002.png") for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    other = pixels(tmp_path / "a" / "noise" / "train" / "class3" / "0001.png")
    clean = [pixels(tmp_path / "a" / "clean" / "train" / "class3" / f"000{n}.png") for n in (1, 2)]
    assert np.corrcoef((other - clean[0]).ravel(), (a - clean[1]).ravel())[0, 1] < 0.2


def test_refusals(photos, tmp_path, capsys):
    def refused(*more):
        assert prepared(tmp_path / "out", *more) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and not (tmp_path / "out").exists()
        return said

    assert "'gray' is none of clean, grey, blur, noise; did you mean 'grey'?" in refused("--domains", "clean,gray")
    assert "'grey' is there twice" in refused("--domains", "grey,grey")
    assert "a file is missing" in refused("--source", photos)  # without --domains, images are what they are
    fewer = shutil.copytree(photos, tmp_path / "fewer")
    shutil.rmtree(fewer / "train" / "class0")
    assert "9 classes in train/, 10 in test/" in refused("--source", fewer, "--domains", "grey")
    large = shutil.copytree(photos, tmp_path / "large")
    Image.new("RGB", (64, 32)).save(large / "test" / "class4" / "0.png")
    assert "64x32 pixels" in refused("--source", large, "--domains", "grey")
    (large / "test" / "class4" / "0.png").write_bytes((photos / "test" / "class4" / "0.png").read_bytes()[:200])
    assert "no image that can be read" in refused("--source", large, "--domains", "grey")
    assert run_main(main_prepare, ["--dataset", "office31", "--source", "x", "--out", "y", "--domains", "dslr"]) == 2
    assert "leave --domains out" in capsys.readouterr().err


def test_other_classes_are_named(tmp_path, capsys):
    for domain, classes in (("a", "pqrstu"), ("b", "ptu"), ("c", "pqrstu"), ("d", "prtu")):
        for name in classes:
            for number in range(2):
                path = tmp_path / "images" / domain / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()

    def said(domains):
        words = ["--data_dir", str(tmp_path / "images"), "--output_csv", "x", "--source", "train", "--domains", domains]
        assert run_main(main_tasks, [*words, "--output_dir", str(tmp_path / "csv")]) == 2
        return capsys.readouterr().err

    assert "b: no class 'q', 'r', 's', which a has; all domains need the same classes\n" in said("a,b,c")
    assert "d: no class 'q', 's', which c has" in said("d,c")
    (tmp_path / "images" / "a" / "o").mkdir()
    (tmp_path / "images" / "a" / "o" / "0.png").touch()
    (tmp_path / "images" / "a" / "o" / "1.png").touch()
    assert "b: no class 'o', 'q', 'r' and 1 more, which a has" in said("a,b")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Office-31's layout from a made archive, through all commands: the folder, and the runs' results by method."""
    folder = tmp_path_factory.mktemp("office")
    archive = as_tar(folder / "office.tar.gz", office(few={"amazon": 6, "webcam": 5, "dslr": 3}))
    assert (
        run_main(main_prepare, ["--dataset", "office31", "--out", str(folder / "images"), "--source", str(archive)])
        == 0
    )
    for source in ("train", "test"):
        words = ["--output_csv", "office31.csv", "--domains", "webcam,dslr,amazon", "--source", source]
        assert main_tasks([*words, "--data_dir", str(folder / "images"), "--output_dir", str(folder / "csv")]) == 0
    tiny = Tiny(folder / "images", folder / "csv", folder / "csv")
    settings = {"image_size": 8, "train_batch_size": 32, "cache_dir": folder / "cache"}
    found = {m: train(tiny, folder / "runs" / m / "seed0", method=m, **settings) for m in ("ours", "ewc", "joint")}
    return folder, found


def test_results_name_the_domains(run):
    folder, found = run
    tasks = found["ours"]["tasks"]
    assert [task["domain"] for task in tasks] == ["webcam", "dslr", "amazon"]
    assert [task["train_images"] for task in tasks] == [4 * 31, 2 * 31, 5 * 31]
    assert [task["replay_of_domains"] for task in tasks] == [{}, {"webcam": 31}, {"webcam": 31, "dslr": 31}]
    assert [task["replay_images"] for task in tasks] == [0, 31, 62]
    sizes = [task["importance_bytes"] for task in found["ewc"]["tasks"]]
    assert (
        sizes == [found["ewc"]["memory_bytes"]["importance"]] * 3 and sizes[0] > 10**6
    )  # the sum over tasks, in float32
    assert [set(task) & {"domain", "replay_of_domains"} for task in found["joint"]["tasks"]] == [{"domain"}] * 3
    log = (folder / "runs" / "ours" / "seed0" / "logger.log").read_text()
    heads = next(line for line in log.splitlines() if "top-1 (%)  " in line)
    assert heads.split()[-3:] == ["webcam", "dslr", "amazon"]
    assert "proxq: it holds weights for classes that a task no longer has" in log
    assert "nothing compares old classes" not in (folder / "runs" / "ewc" / "seed0" / "logger.log").read_text()
    assert (
        "after dslr, top-1 (%): webcam" in log and "\nafter amazon" in log and "tasks: 3 (webcam, dslr, amazon)" in log
    )


def test_a_model_is_tested_on_domains_by_name(run, capsys):
    folder, found = run
    assert command(["--test_only", "--job_dir", str(folder / "runs" / "ours" / "seed0"), "--device", "cpu"]) == 0
    rows = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert {name: rows[name] for name in ("webcam", "dslr", "amazon")} == {
        task["domain"]: f"{a:.2f}" for task, a in zip(found["ours"]["tasks"], found["ours"]["top1"][-1], strict=True)
    }
    assert dataset_json.domains_of({"domains": ["a", "b", "c"]}, [2]) == ["c"]  # --task_id 2
    assert dataset_json.domains_of({"domains": None}, [0]) is dataset_json.domains_of({}, [0]) is None


def test_reports_have_a_table_of_domains(run, tmp_path):
    folder, found = run
    report.main([str(folder / "runs"), "--out", str(tmp_path), "--no_pictures"])
    text = (tmp_path / "report.md").read_text()
    lines = text.splitlines()
    tables = {line.split("`")[1]: at for at, line in enumerate(lines) if line.endswith("(n = 1):")}
    assert set(tables) == {"ours", "ewc", "joint"} and "### Domains, 4 bits" in text
    heads, _, *cells = lines[tables["ours"] + 2 : tables["ours"] + 7]
    assert heads == "| after | training images | replay images | `webcam` | `dslr` | `amazon` | importances, kB |"
    R, tasks = found["ours"]["top1"], found["ours"]["tasks"]
    for t, (line, replay) in enumerate(zip(cells, ("0", "31 `webcam`", "31 `webcam`, 31 `dslr`"), strict=True)):
        accuracies = [f"{R[t][i]:.1f}" if i <= t else f"({R[t][i]:.1f})" for i in range(3)]
        kilobytes = f"{tasks[t]['importance_bytes'] / 1000:.1f}"
        domain = f"`{tasks[t]['domain']}`"
        expected = [domain, str(tasks[t]["train_images"]), replay, *accuracies, kilobytes]
        assert line == "| " + " | ".join(expected) + " |"
    joint = lines[tables["joint"] + 4]
    assert joint == "| all | 341 | 0 | " + " | ".join(f"{a:.1f}" for a in found["joint"]["top1"][0]) + " | - |"


def test_a_report_over_seeds(run, tmp_path):
    """Means and deviations; runs of the same domains in another order are no seeds of one row, and no rows of one table."""
    found = run[1]["ours"]
    for seed, more in ((0, 0.0), (1, 10.0)):
        path = tmp_path / "a" / "ours" / f"seed{seed}" / "results.json"
        path.parent.mkdir(parents=True)
        R = [[a + more for a in row] for row in [[20.0, 1.0, 2.0], [10.0, 30.0, 3.0], [5.0, 15.0, 40.0]]]
        path.write_text(json.dumps({**found, "config": {**found["config"], "seed": seed}, "top1": R}))
    report.main([str(tmp_path / "a"), "--no_pictures"])
    text = (tmp_path / "a" / "report.md").read_text()
    assert "| `webcam` | 124 | 0 | 25.0 ± 7.1 | (6.0 ± 7.1) | (7.0 ± 7.1) |" in text
    turned = [
        {**task, "domain": domain} for task, domain in zip(found["tasks"], ("dslr", "webcam", "amazon"), strict=True)
    ]
    other = tmp_path / "a" / "ours" / "seed2" / "results.json"
    other.parent.mkdir()
    other.write_text(json.dumps({**found, "config": {**found["config"], "seed": 2}, "tasks": turned}))
    assert run_main(report.main, [str(tmp_path / "a"), "--no_pictures"]) == 2
    shutil.move(other.parents[0], tmp_path / "a" / "other")
    report.main([str(tmp_path / "a"), "--no_pictures"])
    assert "### Domains, 4 bits (2)" in (tmp_path / "a" / "report.md").read_text()


GRID = """
[tasks]
dataset = "made"
{tasks}
images_per_class = 2
[flags]
num_epochs = 1
[rows.original]
method = "original"
[rows.replay]
method = "replay"
"""


def test_a_grid_of_domains(photos, tmp_path, capsys):
    prepared(tmp_path / "images", "--source", photos, "--domains", "clean,grey")
    path = tmp_path / "grid.toml"
    path.write_text(GRID.format(tasks='domains = ["grey", "clean"]'))
    runs = grid.runs_of_grid(grid.read_grid(path), tmp_path / "out", "grid")
    assert [bool(run.after) for run in runs] == [False, True]  # they share task 0
    write_tasks(runs[0].tasks, 0, tmp_path / "images", tmp_path / "csv")
    for task, domain in enumerate(("grey", "clean")):
        train_rows, test_rows = (read_rows(tmp_path / "csv" / f"made_{side}{task}.csv") for side in ("train", "test"))
        assert {image.split("/")[0] for image, _ in train_rows + test_rows} == {domain}
        assert (
            set(Counter(label for _, label in train_rows).values()) == {2} and len(train_rows) == len(test_rows) == 20
        )
    assert json.loads((tmp_path / "csv" / "dataset.json").read_text())["domains"] == ["grey", "clean"]
    for tasks, word in (("domains = []", "a list of folders"), ('domains = ["a"]\nnum_tasks = 2', "domains and num_tasks"),
                        ("domains = 3", "needs domains"), ('domain = ["a"]', "needs num_tasks, a number")):  # fmt: skip
        path.write_text(GRID.format(tasks=tasks))
        with pytest.raises(UserError, match=word):
            grid.read_grid(path)


def test_ball_is_plain_where_domains_have_equal_classes():
    """Each class has 10 new images and 2 stored ones: r is the same for all, so that ball_prior is cross entropy."""
    new, replay = torch.arange(5).repeat(10), torch.arange(5).repeat(2)
    labels = torch.cat([new, replay])
    counts = torch.bincount(labels).float()
    torch.manual_seed(0)
    logits, y = torch.randn(32, 5, dtype=torch.float64), torch.randint(5, (32,))
    losses, gradients = [], []
    for loss in (LOSSES["ball_prior"], lambda phi, y, _: F.cross_entropy(phi, y)):
        phi = logits.clone().requires_grad_()
        losses.append(loss(phi, y, counts.double()))
        losses[-1].backward()
        gradients.append(phi.grad)
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    orders = [epoch_order(labels, counts, "ball", generator(0, "sampler", epoch)) for epoch in range(400)]
    share = (torch.cat(orders) >= len(new)).double().mean().item()
    assert share == pytest.approx(1 / 6, abs=0.01)  # the pool's; a sampler that knew of domains would draw half
    drawn = torch.bincount(labels[torch.cat(orders)]).double()
    assert (drawn / drawn.sum() - 0.2).abs().max() < 0.01


def test_ball_balances_unequal_classes_alike_in_all_domains():
    """36 and 8 images of two classes: r = 1 / (2 p + 1) gives the rare one 30 % of the draws, old images none of its own."""
    labels = torch.tensor([0] * 30 + [1] * 6 + [0] * 6 + [1] * 2)
    orders = [epoch_order(labels, torch.tensor([36.0, 8.0]), "ball", generator(0, "sampler", e)) for e in range(1500)]
    drawn = torch.cat(orders)
    rare = labels[drawn] == 1
    assert rare.double().mean().item() == pytest.approx(8 * 44 / 60 / (8 * 44 / 60 + 36 * 44 / 116), abs=0.01)
    assert (drawn[~rare] >= 36).double().mean().item() == pytest.approx(6 / 36, abs=0.01)
    assert (drawn[rare] >= 36).double().mean().item() == pytest.approx(2 / 8, abs=0.01)


def test_proxq_is_zero_where_domains_have_equal_classes():
    """It stands for classes that the new task lacks, and a domain lacks none; proxq_paper's does hold weights."""
    images = torch.randn(30, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    new, replay, past = torch.arange(10, 20), torch.arange(4), torch.arange(10)
    task = Task(1, list(range(5)), images, torch.arange(30) % 5, new, replay, past, 5, 8)
    sums = []
    for name in ("proxq", "proxq_paper"):
        model = network()
        guard = registry.penalty(name)(options.make(method="ours", penalty=name))
        guard.begin_task(model, task)
        with torch.no_grad():
            model.conv2.weight.mul_(1.5)
        sums.append(guard.penalty(model).item())
    assert sums[0] == 0 < sums[1]
