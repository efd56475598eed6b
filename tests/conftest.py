"""Fixtures for every test: repeatable draws, and global settings left as they were found."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch


def _settings() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "distribution validation": torch.distributions.Distribution._validate_args,
    }


@pytest.fixture(autouse=True)
def repeatable_draws(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seed each test by its name: alone or in the suite, it draws the same numbers."""
    seed = zlib.crc32(request.node.nodeid.encode())
    numpy_state = np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        yield
    np.random.set_state(numpy_state)


@pytest.fixture(autouse=True)
def settings_untouched() -> Iterator[None]:
    """Fail a test that leaves another global setting of torch behind."""
    before = _settings()
    yield
    after = _settings()
    torch.set_default_dtype(before["default dtype"])
    torch.set_grad_enabled(before["grad mode"])
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"left changed: {', '.join(changed)}"


@pytest.fixture
def rng_untouched() -> Iterator[None]:
    """Fail a test in which our code drew from, or seeded, the user's global generators."""
    torch_state, numpy_state = torch.get_rng_state(), _numpy_state()
    yield
    assert torch.equal(torch.get_rng_state(), torch_state), "torch's global generator was used"
    assert _numpy_state() == numpy_state, "NumPy's global generator was used"


def _numpy_state() -> tuple[bytes, int]:
    _, keys, position, *_ = np.random.get_state()
    return keys.tobytes(), position
