"""Options that all methods on particles share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ppl.errors import ModelError

Groups = Literal["auto"] | Sequence[Sequence[str]]


@dataclass(frozen=True)
class ParticleOptions:
    """How latents are grouped, proposed and counted.

    Args:
        particles: of every block, or of the blocks that hold these latents; chosen from the size of the model by default.
        groups: latents that share one particle index; latents that are not named are grouped automatically.
        q: family of a latent's proposal (``"Gamma"``, a class, or a law with start values), or of a tuple of latents
            (``MultivariateNormal``: one joint block).
        start: moments of the ``"prior"``, or ``"standard"`` Normals on the unconstrained scale.
        joint_up_to: largest number of scalars in a block with a joint Gaussian; 0 gives products of scalars.
        enumerate_up_to: largest number of values of a discrete latent that is summed exactly.
        final_particles: of the last weighting; chosen from the size of the model by default.
        tails: degrees of freedom of the Student-t proposal of the last weighting; infinite for a Gaussian.
        replicates: of the last weighting; their spread is the standard error of the log evidence. At least 8 by default,
            more where few particles fit into one.
    """

    particles: int | Mapping[str, int] | None = None
    groups: Groups = "auto"
    q: Mapping[Any, Any] | None = None
    start: Literal["prior", "standard"] = "prior"
    joint_up_to: int = 12
    enumerate_up_to: int = 64
    final_particles: int | None = None
    tails: float = 5.0
    replicates: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        counts = (
            self.particles.values() if isinstance(self.particles, Mapping) else [self.particles]
        )
        for count in counts:
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ModelError(
                    f"{name}(particles=...): expected whole numbers of at least 1, got {count!r}."
                )
        if self.start not in ("prior", "standard"):
            raise ModelError(
                f"{name}(start=...): expected 'prior' or 'standard', got {self.start!r}."
            )
        if self.replicates is not None and self.replicates < 1:
            raise ModelError(
                f"{name}(replicates=...): expected at least 1, got {self.replicates!r}."
            )
