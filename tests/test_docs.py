"""What README and docs/ name exists: files, folders, make targets, verbs, groups and settings."""

import re
from pathlib import Path

import pytest

from consilience.cli.main import parse
from consilience.conf.fields import fields_of
from consilience.conf.overrides import CONF, group_options, normalise
from consilience.conf.schema import Config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def _commands(program: str) -> list[str]:
    """Lines of README's code blocks that call a program, without their comments."""
    lines = (line.split("#")[0].strip() for block in _blocks(README) for line in block.splitlines())
    return [line[line.index(program) :] for line in lines if re.match(rf"(ray job .*)?{program} ", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_tree_of_the_readme_is_the_tree():
    (tree,) = [block for block in _blocks(README) if block.startswith("model/")]
    named = {line.split("/")[0] for line in tree.splitlines() if line.strip()}
    there = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))}
    assert named <= there
    assert {name for name in there if (ROOT / name / "__init__.py").exists()} <= named


def test_every_command_of_the_readme_is_one():
    commands = _commands("consilience")
    assert len(commands) >= 6
    options = group_options([CONF])
    for command in commands:
        parsed = parse(command.split()[1:])
        for word in parsed.overrides:
            if parsed.verb == "help":
                assert word in fields_of(Config), command
            else:
                normalise(word, options)


def test_every_make_target_that_is_named_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {
        t for page in PAGES for t in re.findall(r"`?make ([a-z][a-z-]*)", page.read_text(encoding="utf-8"))
    }
    assert {"demo", "test", "check"} <= named
    assert named <= targets


def test_the_six_files_to_read_are_six():
    (section,) = re.findall(r"## Read these six files.*?(?=\n## |\nDeveloping|\Z)", README, re.DOTALL)
    assert len(re.findall(r"^\d\. \[", section, re.MULTILINE)) == 6
