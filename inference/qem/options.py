"""Options of QEM, and the step sizes that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ppl.errors import ModelError

Groups = Literal["auto"] | Sequence[Sequence[str]]


@dataclass(frozen=True)
class QEM:
    """Expectation maximisation on massively parallel importance weights.

    Args:
        particles: of every block, or of the blocks that hold these latents; chosen from the size of the model by default.
        groups: latents that share one particle index; latents that are not named are grouped automatically.
        q: family of a latent's proposal (``"Gamma"``, a class, or a law with start values), or of a tuple of latents
            (``MultivariateNormal``: one joint block).
        step: share of the new moments in the average: ``"schedule"``, a constant, or a function of the iteration.
        bridge: temper the posterior while its effective sample size is low.
        variance_correction: divide variances by ``1 - sum(w^2)``; helps with few particles, hurts elsewhere.
        start: moments of the ``"prior"``, or ``"standard"`` Normals on the unconstrained scale.
        joint_up_to: largest number of scalars in a block with a joint Gaussian; 0 gives products of scalars.
        enumerate_up_to: largest number of values of a discrete latent that is summed exactly.
        final_particles: of the last weighting; chosen from the size of the model by default.
        tails: degrees of freedom of the Student-t proposal of the last weighting; infinite for a Gaussian.
        replicates: of the last weighting; their spread is the standard error of the log evidence. At least 8 by default,
            more where few particles fit into one.

    Source: [Heap2025]; the bridge and joint blocks are additions.
    """

    particles: int | Mapping[str, int] | None = None
    groups: Groups = "auto"
    q: Mapping[Any, Any] | None = None
    step: str | float | Any = "schedule"
    bridge: bool = True
    variance_correction: bool = False
    start: Literal["prior", "standard"] = "prior"
    joint_up_to: int = 12
    enumerate_up_to: int = 64
    final_particles: int | None = None
    tails: float = 5.0
    replicates: int | None = None

    def __post_init__(self) -> None:
        counts = (
            self.particles.values() if isinstance(self.particles, Mapping) else [self.particles]
        )
        for count in counts:
            if count is not None and (not isinstance(count, int) or count < 1):
                raise ModelError(
                    f"QEM(particles=...): expected whole numbers of at least 1, got {count!r}."
                )
        if self.start not in ("prior", "standard"):
            raise ModelError(f"QEM(start=...): expected 'prior' or 'standard', got {self.start!r}.")
        if isinstance(self.step, str) and self.step != "schedule":
            raise ModelError(
                f"QEM(step=...): expected 'schedule', a number in (0, 1] or a function, got {self.step!r}."
            )
        if isinstance(self.step, (int, float)) and not 0 < self.step <= 1:
            raise ModelError(f"QEM(step=...): a constant step lies in (0, 1], got {self.step!r}.")
        if self.replicates is not None and self.replicates < 1:
            raise ModelError(f"QEM(replicates=...): expected at least 1, got {self.replicates!r}.")

    def step_at(self, t: int) -> float:
        """Share of the new moments at iteration ``t`` = 0, 1, ... since the bridge was crossed.

        The default falls as ``t^-0.6``, so that the variance of the average falls with it (Theorem 1 of [Heap2025]),
        between a cap that keeps a bad start from making the proposal a near point mass and a floor.

        >>> [round(QEM().step_at(t), 3) for t in (0, 10, 1000)]
        [0.3, 0.205, 0.016]
        """
        if callable(self.step):
            return float(self.step(t))
        if isinstance(self.step, str):
            return min(max((t + 4.0) ** -0.6, 0.01), 0.3)
        return float(self.step)
