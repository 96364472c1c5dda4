"""``~`` is the home folder in every flag that names a file or a folder; a shell leaves it in ``--out=~/runs``."""

from __future__ import annotations

from pathlib import Path

from support.tiny import Tiny, settings, write_csvs

from lifequant import options
from lifequant.__main__ import VERBS, train
from lifequant.common.arguments import Parser, run_main


def test_home_folder_in_every_flag(tiny: Tiny, tmp_path, monkeypatch, capsys):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    (home / "images").symlink_to(tiny.images)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    write_csvs(Path("~/images"), Path("~/csvs"))
    argv = settings(
        tiny, Path("~/runs/a"), csv_dir="~/csvs", data_dir="~/images", cache_dir="~/cache", method="original"
    )
    assert train([f"--{name}={value}" for name, value in argv.items()]) == 0
    assert {path.name for path in home.iterdir()} == {"images", "csvs", "runs", "cache"} and not list(here.iterdir())
    run = ["~/runs/a"]
    for verb, words in {"report": [*run, "--out=~/report"], "compare": run, "cache": ["--cache_dir=~/cache"],
                        "replay": ["--data_dir=~/csvs"], "counts": ["--data_dir=~/csvs"]}.items():  # fmt: skip
        module, function = VERBS[verb][0].split(":")
        assert run_main(getattr(__import__(module, fromlist=[function]), function), words) == 0, capsys.readouterr().err
    assert (home / "report" / "report.md").is_file() and (home / "csvs" / "tiny_replay0.csv").is_file()
    assert not list(here.iterdir())


def test_what_is_a_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    parser = Parser()
    parser.add_argument("--one")
    parser.add_argument("--more", nargs="+")
    found = parser.parse_args(["--one=~/a", "--more", "~", "a~", "./~/b"])
    assert (found.one, found.more) == (f"{tmp_path}/a", [str(tmp_path), "a~", "./~/b"])
    assert options.make(source_file="~/model.pt", resume="True").resume == options.RESUME_JOB_DIR
