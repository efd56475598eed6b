"""Every example in a docstring runs, with the words of the language at hand."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import ppl

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"ppl": "ppl", "inference": "ppl.inference", "models": "ppl.models"}


def modules_with_examples() -> list[str]:
    names = []
    for folder, package in PACKAGES.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if ">>> " in file.read_text(encoding="utf-8"):
                parts = file.relative_to(ROOT / folder).with_suffix("").parts
                names.append(".".join((package, *(p for p in parts if p != "__init__"))))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_of(name):
    module = importlib.import_module(name)
    words = {word: getattr(ppl, word) for word in ppl.__all__ if not hasattr(module, word)}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    report: list[str] = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(
        module, name, extraglobs={"torch": torch, **words}
    ):
        runner.run(example, out=report.append)
    assert runner.tries, f"{name} has '>>>' in its text, but no docstring that doctest finds"
    assert not runner.failures, "".join(report)
