"""Fixtures of tests of models and their data."""

from __future__ import annotations

import pytest

from ppl.models import files


@pytest.fixture
def data_folder(tmp_path, monkeypatch):
    """An empty data folder that hides any other."""
    monkeypatch.setenv("PPL_DATA", str(tmp_path))
    monkeypatch.setattr(files, "_CHECKOUT", tmp_path / "no checkout")
    return tmp_path
