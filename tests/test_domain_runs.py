"""A run whose tasks are domains, from an archive with Office-31's layout to the report."""

from __future__ import annotations

import json
import shutil

import pytest
from support.archives import as_tar, office
from support.tiny import Tiny, train

from lifequant.__main__ import train as command
from lifequant.common.arguments import run_main
from lifequant.data import dataset_json
from lifequant.data.create.images import main_prepare
from lifequant.data.create.tasks import main_tasks
from lifequant.experiments import report

pytestmark = pytest.mark.usefixtures("no_fsync")


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


def test_a_fork_keeps_its_own_importances(run, tmp_path):
    """ewc that begins at task 1 with the state of original: all its results are those that it has alone."""
    folder, found = run
    tiny = Tiny(folder / "images", folder / "csv", folder / "csv")
    settings = {"image_size": 8, "train_batch_size": 32, "cache_dir": folder / "cache"}
    train(tiny, tmp_path / "original", method="original", **settings)
    forked = train(tiny, tmp_path / "ewc", method="ewc", start_task=1, **{"from": tmp_path / "original"}, **settings)
    assert forked["tasks"] == found["ewc"]["tasks"] and forked["top1"] == found["ewc"]["top1"]


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
