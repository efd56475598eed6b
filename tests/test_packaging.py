"""Three folders install as one package, and never get in the way of a user's ``inference.py``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"ppl": "ppl", "inference": "ppl.inference", "models": "ppl.models"}

USER_SCRIPT = """
import inference, models
import ppl.inference, ppl.models, ppl.inference.numerics

assert inference.OWNER == models.OWNER == "the user"
assert ppl.inference is not inference and ppl.models is not models
print(ppl.__file__)
"""
NOT_OURS = """
import importlib, sys
import ppl.inference, ppl.models
for name in ("inference", "models"):
    assert name not in sys.modules
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise AssertionError(f"'import {name}' found a file of ours")
"""
IS_TYPED = """
import importlib.resources
assert importlib.resources.files("ppl").joinpath("py.typed").is_file()
"""


def declared() -> list[str]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]


def test_every_package_is_listed():
    found = set()
    for folder, name in PACKAGES.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            found.add(".".join((name, *init.parent.relative_to(ROOT / folder).parts)))
    assert set(declared()) == found


def test_every_folder_with_modules_is_a_package():
    folders = {file.parent for folder in PACKAGES for file in (ROOT / folder).rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").is_file()]


def test_nothing_is_imported_under_a_top_level_name():
    import ppl.inference
    import ppl.models

    ours = [str(ROOT / "inference"), str(ROOT / "models")]
    for name in ("inference", "models"):
        file = getattr(sys.modules.get(name), "__file__", None) or ""
        assert not file.startswith(tuple(ours))
    assert ppl.inference.__name__ == "ppl.inference" and ppl.models.__name__ == "ppl.models"


def test_version_is_the_same_everywhere():
    import ppl

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == ppl.__version__


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A copy to build from, so that a build leaves nothing in the checkout."""
    copy = tmp_path_factory.mktemp("sources") / "checkout"
    copy.mkdir()
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture
def user_folder(tmp_path) -> Path:
    folder = tmp_path / "project of a user"
    folder.mkdir()
    for name in ("inference", "models"):
        (folder / f"{name}.py").write_text('OWNER = "the user"\n')
    (folder / "script.py").write_text(USER_SCRIPT)
    return folder


def environment(folder: Path) -> Path:
    """A virtual environment that sees the libraries of this one, but no ``ppl`` of it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    # A path in a .pth file is added as it is: .pth files in it, such as that of an editable
    # install of this project, are not read.
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, *what: str) -> None:
    pip = [sys.executable, "-m", "pip", f"--python={python}", "--quiet"]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", *options, *what], check=True, env=clean_environment())


def clean_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(python: Path | str, *args: str, cwd: Path | None = None, path: Path | None = None) -> str:
    variables = clean_environment() | ({"PYTHONPATH": str(path)} if path else {})
    result = subprocess.run(
        [str(python), *args], cwd=cwd, env=variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_bare_checkout(sources, user_folder, tmp_path):
    python = environment(tmp_path / "env")
    assert str(sources) in run(python, "script.py", cwd=user_folder, path=sources)
    run(python, "-c", NOT_OURS, cwd=sources)


def test_wheel(sources, user_folder, tmp_path):
    python = environment(tmp_path / "env")
    install(python, str(sources))
    assert str(tmp_path / "env") in run(python, "script.py", cwd=user_folder)
    run(python, "-c", IS_TYPED, cwd=tmp_path)
    run(python, "-c", NOT_OURS, cwd=tmp_path)
    run(python, "-c", NOT_OURS, cwd=sources)


def test_editable(sources, user_folder, tmp_path):
    python = environment(tmp_path / "env")
    install(python, "--editable", str(sources))
    assert str(sources) in run(python, "script.py", cwd=user_folder)
    run(python, "-c", NOT_OURS, cwd=tmp_path)
    run(python, "-c", NOT_OURS, cwd=sources)
