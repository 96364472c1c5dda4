"""What a grid stands for: its runs, their keys and their tasks' seeds, and mistakes in it."""

from __future__ import annotations

import hashlib

import pytest
from PIL import Image
from test_sweep import GRID, called, write

from lifequant.common.errors import UserError
from lifequant.experiments import grid as grid_file
from lifequant.experiments import report, result_files


def test_lists_are_combined_and_excluded(tmp_path):
    text = GRID + '[exclude.slow]\nrow = "bad"\nbitW = [2, 4]\n'
    text = text.replace("[flags]", "[flags]\nbitW = [4, 2]\nseed = [0, 1]")
    runs = grid_file.runs_of_grid(grid_file.read_grid(write(tmp_path, text)), tmp_path, "grid")
    assert [run.name for run in runs] == [
        f"{row}/bitW{bits}/seed{seed}" for seed in (0, 1) for row in ("replay", "more replay") for bits in (4, 2)
    ]
    assert len({run.folder for run in runs}) == 8 and len({run.csv_dir for run in runs}) == 1


def test_tasks_have_a_seed_of_their_own(tmp_path):
    """0 for all runs, another number, or each run's own; a run whose seed it is has the same key whichever way it is said."""

    def runs(line: str) -> list[grid_file.Run]:
        text = GRID.replace("[flags]", f"{line}\n[flags]\nseed = [0, 1]")
        return grid_file.runs_of_grid(grid_file.read_grid(write(tmp_path, text)), tmp_path, "grid")[::3]

    fixed, own, one = runs(""), runs('task_seed = "seed"'), runs("task_seed = 1")
    assert [run.seed for run in fixed] == [0, 1]
    assert [[run.task_seed for run in found] for found in (fixed, own, one)] == [[0, 0], [0, 1], [1, 1]]
    assert [run.csv_dir for run in own] == [fixed[0].csv_dir, one[0].csv_dir]
    keys = [[run.folder.name for run in found] for found in (fixed, own, one)]
    assert keys[0][0] == keys[1][0] and keys[2][1] == keys[1][1]
    assert len({*keys[0], *keys[1], *keys[2]}) == 4
    said = [grid_file.task_seeds(found) for found in (fixed, own)]
    assert said[0].endswith("made with seed 0, the same for all runs") and "own seed (0, 1)" in said[1]


def test_a_source_from_elsewhere(tmp_path):
    """All runs begin from a file. Their keys follow from its content, and can be had without it where the grid says its hash."""
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"some weights")
    full = hashlib.sha256(b"some weights").hexdigest()

    def runs(source: str) -> list[grid_file.Run]:
        text = GRID.replace("[flags]", f"[source]\n{source}\n[flags]")
        return grid_file.runs_of_grid(grid_file.read_grid(write(tmp_path, text)), tmp_path, "grid")

    plain = runs(f'file = "{weights}"')
    assert all(run.flags["source_file"] == weights and not run.after and not run.is_source for run in plain[:1])
    for source in (f'file = "{weights}"\nsha256 = "{full}"', f'file = "gone.pth"\nsha256 = "{full[:8]}"'):
        assert [run.folder for run in runs(source)] == [run.folder for run in plain]
    weights.write_bytes(b"other weights")
    assert runs(f'file = "{weights}"')[0].folder != plain[0].folder
    for source, said in (
        (f'file = "{weights}"\nsha256 = "{full}"', "is another file"),
        ('file = "gone.pth"', "no file gone.pth"),
        (f'file = "{weights}"\nnum_epochs = 3', "can't have 'num_epochs'"),
    ):
        with pytest.raises(UserError, match=said):
            runs(source)


def test_seeds_with_tasks_of_other_sizes_are_reported(tmp_path):
    """Classes of 4 to 7 images in another order for each seed: the sweep's runs are averaged, on the same tasks or not."""
    for label in range(4):
        for side, count in (("train", 4 + label), ("test", 2)):
            folder = tmp_path / "images" / side / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (60 * label, 20 * i, 0)).save(folder / f"{i}.png")
    text = GRID[: GRID.index('[rows."more replay"]')].replace("images_per_class = 6\n", 'task_seed = "seed"\n')
    grid = write(tmp_path, text.replace("[flags]", "[flags]\nseed = [1, 2]"))
    assert called(grid, tmp_path / "images", tmp_path / "out", "--jobs", "2").returncode == 0
    found = result_files.results_below(tmp_path / "out" / "grid", ("tasks",))
    assert len({tuple(task["train_images"] for task in results["tasks"]) for _, results in found}) == 2
    assert report.main([str(tmp_path / "out" / "grid"), "--no_pictures"]) == 0
    said = (tmp_path / "out" / "grid" / "report.md").read_text()
    assert "| `replay` | 2 |" in said and "training images a task: " in said and " to " in said


def test_the_key_is_of_what_decides(tmp_path):
    """Not of the place, of print_freq, nor of the row's name; but of the tasks, and of each flag."""

    def key(text: str, out: str = "a") -> str:
        return grid_file.runs_of_grid(grid_file.read_grid(write(tmp_path, text)), tmp_path / out, "grid")[0].folder.name

    same = [
        key(GRID),
        key(GRID, "b"),
        key(GRID.replace("[flags]", "[flags]\nprint_freq = 7")),
        key(GRID.replace("rows.replay", "rows.other")),
    ]
    others = [
        GRID.replace("= 100", "= 50"),
        GRID.replace("num_epochs = 1", "num_epochs = 2"),
        GRID + "[source]\nnum_epochs = 1\n",
    ]
    assert len(set(same)) == 1 and len({same[0], *map(key, others)}) == 4


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("[flags]", "[flag]"), "unknown part 'flag'; did you mean 'flags'?"),
        (("num_tasks = 2", 'num_tasks = "2"'), "[tasks] needs num_tasks, a number"),
        (("num_tasks = 2", 'num_tasks = 2\ntask_seed = "run"'), '[tasks] task_seed = "run": give a number, or "seed"'),
        (("diminish_rate = 100", "diminish_rate = 0"), "[tasks] diminish_rate: '0' is no share"),
        (("num_epochs = 1", "num_epoch = 1"), "replay/seed0: unknown flag --num_epoch"),
        (("lr = 1e30", 'job_dir = "x"'), "bad/seed0: job_dir is the sweep's own to set"),
        (("replay_rate = 0.5", ""), "are the same run"),
        (("[tasks]", "[exclude.none]\nrow = 'x'\n[tasks]"), "the exclusion 'none' leaves nothing out"),
    ],
)
def test_mistakes(tmp_path, change, line):
    with pytest.raises(UserError) as error:
        grid_file.runs_of_grid(grid_file.read_grid(write(tmp_path, GRID.replace(*change))), tmp_path, "grid.toml")
    assert line in str(error.value)
