"""Data files: where they are looked for, and what is said where they are not.

A file is looked for in the folder that ``$PPL_DATA`` names, then in ``../shared/data`` beside a
source checkout. Nothing is downloaded: where a file is missing, the error says where to get it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppl.errors import DataError

_CHECKOUT = Path(__file__).resolve().parent.parent


class Split(NamedTuple):
    """Data to fit, and data of the same form to judge the fit by."""

    train: dict[str, Any]
    test: dict[str, Any]


def find(name: str) -> Path | None:
    """The data file of this name, or None where it is not on this machine.

    Args:
        name: path inside the data folder, such as ``"radon/radon_states.npz"``.

    >>> find("no such file") is None
    True
    """
    folder = os.environ.get("PPL_DATA")
    folders = [Path(folder).expanduser()] if folder else []
    if (_CHECKOUT / "pyproject.toml").is_file():
        folders.append(_CHECKOUT.parent / "shared" / "data")
    paths = (folder / name for folder in folders)
    return next((path for path in paths if path.is_file()), None)


def arrays_of(name: str, source: str) -> dict[str, np.ndarray]:
    """The arrays of a NumPy archive.

    Args:
        name: path inside the data folder.
        source: where the file is to be had, for the error that says that it is not here.

    Raises:
        DataError: the file is not on this machine.
    """
    path = find(name)
    if path is None:
        raise absent(name, source)
    with np.load(path) as archive:
        return {key: archive[key] for key in archive.files}


def absent(name: str, source: str) -> DataError:
    """The error for a file that is nowhere, with where it is to be had."""
    folder = os.environ.get("PPL_DATA")
    looked = f"'{folder}' ($PPL_DATA)" if folder else "$PPL_DATA (not set)"
    return DataError(
        f"the data file '{name}' is not on this machine: looked in {looked} and in ../shared/data "
        f"beside a source checkout. Set PPL_DATA to a folder and put the file there. It is from "
        f"{source}."
    )
