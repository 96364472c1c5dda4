"""What README and docs show: their examples run, their lists are whole, their links lead somewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support.tiny import train

from lifequant import registry
from lifequant.__main__ import VERBS
from lifequant.config import Config
from lifequant.losses import LOSSES

TOP = Path(__file__).resolve().parents[1]
README = (TOP / "README.md").read_text(encoding="utf-8")
PAGES = [TOP / "README.md", *sorted((TOP / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
OWN_FILE = re.compile(r"`(lifequant/\w+/\w+\.py)`:\n\n```python\n(.*?)```", re.DOTALL)


def blocks(page: Path) -> list[str]:
    """The Python examples of a page that stand for themselves: neither a new file of the package, nor marked no-run."""
    text = page.read_text(encoding="utf-8")
    files = {code for _, code in OWN_FILE.findall(text)}
    return [code for kind, code in FENCE.findall(text) if kind == "python" and code not in files]


EXAMPLES = [(page, number, code) for page in PAGES for number, code in enumerate(blocks(page))]
NEW_FILES = [found for page in PAGES for found in OWN_FILE.findall(page.read_text(encoding="utf-8"))]


def test_readme_is_one_page():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize(("page", "code"), [pytest.param(p, c, id=f"{p.stem}{n}") for p, n, c in EXAMPLES])
def test_example_runs(page, code):
    exec(compile(code, str(page), "exec"), {})


@pytest.mark.parametrize(("file", "code"), [pytest.param(f, c, id=Path(f).stem) for f, c in NEW_FILES])
def test_new_file(file, code, tiny, tmp_path, monkeypatch):
    """As a file of the package would, it registers itself, and two tasks train with it."""
    for kind in registry._registered:
        registry.names(kind)
    monkeypatch.setattr(registry, "_registered", {k: dict(v) for k, v in registry._registered.items()})
    exec(compile(code, file, "exec"), {})
    kind, name = Path(file).parent.name.removesuffix("s").replace("penaltie", "penalty"), Path(file).stem
    found = train(tiny, tmp_path / "run", **{"method": "replay", kind: name})
    assert found["config"][kind] == name
    assert all(entry["codes"] <= 2 ** entry["bits"] for entry in found["max_codes_per_tensor"].values())
    if name == "l2":
        assert found["memory_bytes"]["reference"] > 4 * 268_000


def test_all_kinds_have_an_example():
    assert {Path(file).parent.name for file, _ in NEW_FILES} == {"methods", "penalties", "quantizers"}


def test_lists_are_whole():
    """README names everything that is registered, every preset and every verb."""
    for kind in ("method", "penalty", "quantizer", "model"):
        assert all(f"`{name}`" in README for name in registry.names(kind)), kind
    assert all(f"`{verb}`" in README for verb in [*VERBS, "paper", "tuned"])


def test_flags_that_people_use_exist():
    text = (TOP / "docs" / "workflow.md").read_text(encoding="utf-8")
    table = set(re.findall(r"`--(\w+)", text[text.index("## Flags") :]))
    assert table <= {*Config.__dataclass_fields__, "help"}
    assert all(f"`{loss}`" in text for loss in LOSSES)


def test_flags_page_is_up_to_date(monkeypatch):
    monkeypatch.syspath_prepend(str(TOP / "scripts"))
    monkeypatch.delitem(sys.modules, "make_flags_page", raising=False)
    import make_flags_page

    wanted = (TOP / "docs" / "flags.md").read_text(encoding="utf-8")
    assert make_flags_page.page() == wanted, "run python scripts/make_flags_page.py"


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse words its help in another way")
@pytest.mark.parametrize("verb", VERBS)
def test_stored_help_is_up_to_date(verb, monkeypatch):
    monkeypatch.syspath_prepend(str(TOP / "scripts"))
    import make_flags_page

    stored = (make_flags_page.HELP / f"{verb}.txt").read_text(encoding="utf-8")
    assert make_flags_page.help_text(verb) == stored, "run python scripts/make_flags_page.py"
    assert stored.startswith(f"usage: lifequant {verb} ")


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links(page):
    """Relative links lead to files, and their anchors to headings."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
