"""Options of reweighted wake-sleep."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ppl.errors import ModelError
from ppl.inference.particles.options import ParticleOptions

_PLAIN_PARTICLES = 100


@dataclass(frozen=True)
class RWS(ParticleOptions):
    """Wake-phase reweighted wake-sleep: proposals move along the gradient of ``E_post[log q]`` by Adam.

    Args:
        learning_rate: of Adam on raw parameters: locations as they are, scales as logs.
        parallel: weigh all combinations of the particles of all blocks; False: one shared index for all blocks, inside
            plates too (global importance weights).
        settle: shrink the step when only noise is left, and average the last iterates; False: a constant step.
        **others: those of :class:`~ppl.inference.particles.options.ParticleOptions`; the number of steps is ``max_iters``.

    The result depends on the units of the latents, as Adam's steps do; QEM's does not.

    Sources: [Heap2023], [Bornschein2015], [Le2019].

    >>> RWS(particles=30).parallel
    True
    """

    joint_chains: ClassVar[bool] = False

    learning_rate: float = 0.03
    parallel: bool = True
    settle: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.learning_rate, (int, float)) or not self.learning_rate > 0:
            raise ModelError(
                f"RWS(learning_rate=...): expected a positive number, got {self.learning_rate!r}."
            )
        if not self.parallel and self.particles is not None and not isinstance(self.particles, int):
            raise ModelError(
                "RWS(parallel=False) has one particle index for all blocks: particles=... is one number."
            )

    @property
    def shared_particles(self) -> int:
        """Joint draws of a step where ``parallel`` is off."""
        return self.particles if isinstance(self.particles, int) else _PLAIN_PARTICLES
