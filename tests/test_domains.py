"""Tasks that are domains: images made for them, grids, and what BaLL and ProxQ do."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.small_tasks import network

from lifequant import options, registry
from lifequant.common.arguments import run_main
from lifequant.common.errors import UserError
from lifequant.common.seeding import generator
from lifequant.data.create.images import main_prepare
from lifequant.data.create.tasks import main_tasks
from lifequant.data.replay import epoch_order
from lifequant.data.task import Task
from lifequant.data.task_csv import read_rows
from lifequant.experiments import grid
from lifequant.experiments.grid_tasks import write_tasks
from lifequant.losses import LOSSES

pytestmark = pytest.mark.usefixtures("no_fsync")

MADE = ["clean", "grey", "blur", "noise"]


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
