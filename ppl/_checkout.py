"""Let a source checkout import ``ppl.inference`` and ``ppl.models``.

In the repository these packages are the top-level folders ``inference/`` and ``models/``; an
installed wheel has them inside ``ppl/``.  This finder maps the two names, and nothing else, when
``ppl`` comes straight from a checkout.  It never answers for plain ``inference`` or ``models``:
those stay the user's.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

NAMES = ("inference", "models")


class CheckoutFinder:
    """Asked last, only when the ordinary import system found nothing."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The spec of one of the mapped packages; their sub-packages are then found as usual."""
        folder = self.folders.get(name)
        if folder is None:
            return None
        return spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def install(package_dir: Path) -> None:
    """Map the packages of the checkout that ``package_dir`` stands in; do nothing anywhere else."""
    root = package_dir.parent
    if not (root / "pyproject.toml").is_file():
        return
    folders = {
        f"{package_dir.name}.{name}": root / name
        for name in NAMES
        if not (package_dir / name).is_dir() and (root / name / "__init__.py").is_file()
    }
    if folders:
        sys.meta_path.append(CheckoutFinder(folders))
