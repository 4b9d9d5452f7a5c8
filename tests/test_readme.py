"""The README says what is there: its commands exist, its tree is the repository's."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from emoexport import cli
from emoexport.engines import BACKENDS
from emoexport.precision import PRECISIONS
from emoexport.rewrites import REWRITES
from emoexport.views import VIEWS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"^\s*(emoexport [a-z]+)", README, flags=re.MULTILINE)))
MAKE_TARGETS = sorted(set(re.findall(r"\bmake ([a-z-]+)", README)))


def test_the_readme_names_every_command():
    known = {command.name or command.callback.__name__ for command in cli.app.registered_commands}
    groups = {group.name: group.typer_instance for group in cli.app.registered_groups}
    assert {command.split()[1] for command in COMMANDS} == known | set(groups)
    for name, group in groups.items():
        for command in group.registered_commands:
            assert f"emoexport {name} {command.callback.__name__}" in README


@pytest.mark.parametrize("line", re.findall(r"^\s*(emoexport [a-z]+ .*?)\s*(?:#.*)?$", README, flags=re.MULTILINE))
def test_every_option_in_the_readme_exists(line, monkeypatch, capsys):
    words = shlex.split(line)
    command = words[: 3 if words[1] in {group.name for group in cli.app.registered_groups} else 2]
    monkeypatch.setattr("sys.argv", [*command, "--help"])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert not exited.value.code
    shown = capsys.readouterr().out
    for option in (word for word in words if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", shown), f"{option} of: {line}"


@pytest.mark.parametrize("target", MAKE_TARGETS)
def test_every_make_target_in_the_readme_exists(target):
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, check=True)


def test_the_tree_is_that_of_the_repository():
    tree = README.split("## The tree")[1].split("```")[1]
    folder, listed = "", set()
    for line in tree.splitlines()[1:]:
        indent, name = re.match(r"( *)(\S*)", line).groups()
        if not name:
            continue
        folder = "" if not indent else folder
        if name.endswith("/"):
            folder = name
        else:
            listed.add(folder + name if indent else name)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sources = {
        path
        for path in tracked
        if path.endswith(".py") and path.split("/")[0] in {"exporter", "train", "engines", "calib", "bench.py"}
    }
    assert {name for name in listed if name.endswith(".py")} == {p for p in sources if not p.endswith("__init__.py")}


def test_the_tables_are_named_in_full():
    for row in (*BACKENDS.values(), *PRECISIONS.values()):
        assert row.title in README
    for name in REWRITES:
        assert f"\n| `{name}` |" in README
    for name in VIEWS:
        assert name.removesuffix("-flipped") in README


def test_figures_come_from_results():
    """Every row of the README's table of results stands in a report under docs/results, to the letter."""
    results = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/results").rglob("*.md"))
    section = README.split("## What it finds")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and re.search(r"\d", line)]
    assert len(rows) > 5
    for row in rows:
        assert row in results, row
