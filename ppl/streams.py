"""Random streams: one seed a call, one generator a site, derived from the site's name.

Adding a site does not shift the draws of the others, and the user's global generator is left as it was.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ppl.errors import ModelError


class Streams:
    """Generators by name, all derived from one seed.

    >>> a, b = Streams(1).of("x"), Streams(1).of("x")
    >>> bool(torch.rand(1, generator=a) == torch.rand(1, generator=b))
    True
    """

    def __init__(self, seed: int | None, device: torch.device | str = "cpu") -> None:
        if seed is not None and not (hasattr(seed, "__index__") and not isinstance(seed, bool)):
            raise ModelError(f"seed: expected a whole number or None, got {seed!r}.")
        # Without a seed one number is drawn from the global generator, so that torch.manual_seed still governs.
        self.seed = int(torch.randint(2**31, (1,)).item()) if seed is None else int(seed)
        self.device = torch.device(device)
        self._made: dict[str, torch.Generator] = {}

    def of(self, name: str) -> torch.Generator:
        """The generator of this name; it advances from call to call."""
        if name not in self._made:
            mixed = (self.seed * 0x9E3779B1 + zlib.crc32(name.encode())) % 2**63
            self._made[name] = torch.Generator(self.device).manual_seed(mixed)
        return self._made[name]

    def child(self, name: str) -> Streams:
        """Independent streams for a part of the work."""
        return Streams((self.seed * 31 + zlib.crc32(name.encode())) % 2**31, self.device)

    def state(self) -> dict[str, torch.Tensor]:
        """Positions of all generators, for checkpoints."""
        return {name: generator.get_state() for name, generator in self._made.items()}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Continue from :meth:`state`."""
        for name, position in state.items():
            self.of(name).set_state(position)


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Run with the global generators seeded, and put them back afterwards.

    Samplers of ``torch.distributions`` take no generator; they draw inside this scope.
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed % 2**63)
        yield
