"""Files of the optional data folder; where one is missing the test that needs it is skipped."""

from __future__ import annotations

from pathlib import Path

import pytest

from ppl.models import datasets


def data_file(name: str) -> Path:
    """Its path; skips the test where the file is not on this machine."""
    path = datasets.find(name)
    if path is None:
        pytest.skip(f"the data file '{name}' is not on this machine; PPL_DATA names its folder")
    return Path(path)
