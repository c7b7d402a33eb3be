"""What the wheel holds is what the repository holds."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
NO_PACKAGES = {"tests", "bench", "examples", "docs", "build", "dist", "runs", "wandb"}


def _folders_with_python() -> set[str]:
    tops = (
        p for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".") and p.name not in NO_PACKAGES
    )
    folders = {file.parent for top in tops for file in top.rglob("*.py") if "__pycache__" not in file.parts}
    return {"consilience." + ".".join(folder.relative_to(ROOT).parts) for folder in folders}


def test_the_list_of_packages_equals_the_folders_that_hold_code():
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == _folders_with_python()


def test_every_package_has_an_init_file():
    for name in PYPROJECT["tool"]["setuptools"]["packages"]:
        assert (ROOT.joinpath(*name.split(".")[1:]) / "__init__.py").is_file(), name


def test_every_configuration_file_is_package_data():
    data = PYPROJECT["tool"]["setuptools"]["package-data"]
    for file in (ROOT / "conf").rglob("*.yaml"):
        assert any(file.match(pattern) for pattern in ("*.yaml",)) and data["consilience.conf"] == [
            "**/*.yaml"
        ], file


def test_type_checks_cover_every_room():
    rooms = {name.split(".")[1] for name in PYPROJECT["tool"]["setuptools"]["packages"]}
    assert set(PYPROJECT["tool"]["pyright"]["include"]) >= rooms


def test_no_bare_room_name_may_be_imported():
    rooms = {name.split(".")[1] for name in PYPROJECT["tool"]["setuptools"]["packages"]}
    banned = set(PYPROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"])
    assert rooms <= banned


def test_the_command_points_at_a_function_that_exists():
    module, function = PYPROJECT["project"]["scripts"]["consilience"].split(":")
    assert module == "consilience.cli.main"
    assert f"def {function}(" in (ROOT / "cli" / "main.py").read_text()
