"""Options that all methods on particles share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from ppl.errors import ModelError

_OUTSIDE = 8
Groups = Literal["auto", "correlation"] | Sequence[Sequence[str]]
Start = Literal["prior", "standard", "laplace", "gbp", "auto"]

CHEAP = ("laplace", "gbp")  # methods whose result can be the start


@dataclass(frozen=True)
class ParticleOptions:
    """How latents are grouped, proposed and counted.

    Args:
        particles: of every block, or of the blocks that hold these latents; chosen from the size of the model by default.
            ``"auto"``: after a pilot, more for blocks with few effective particles, at the same size of the largest array.
        groups: latents that share one particle index; latents that are not named are grouped automatically, where they meet
            in a factor and, where they are more scalars than ``joint_up_to``, by their posterior correlation in a pilot run.
            ``"correlation"``: always after a pilot.
        q: how a latent is proposed, or a tuple of latents as one block: a family (``"Gamma"``, a class, or a law with start
            values; ``MultivariateNormal`` for a joint block), or a form of ``ppl.inference.particles``: ``Prior()`` (its own
            law), ``Tilted()`` (its own law, tilted towards the posterior), ``LinearGaussian(given=...)``,
            ``Table(given=...)`` for a discrete parent, ``Mirrored(flips=...)`` (both signs of these latents), ``Tied(...)`` (one
            proposal for a whole plate). A discrete latent that is named here is sampled, not enumerated.
        start: moments of the ``"prior"``, ``"standard"`` Normals on the unconstrained scale, or the result of another method
            that fits the model cheaply, ``"laplace"`` or ``"gbp"``; latents in spreads are then set to the mode of their
            marginal posterior. ``"auto"``, the default of qem: the prior, or laplace where it fits the model and a
            thousandth of what the data say already leaves few of the prior's particles.
        joint_up_to: largest number of scalars in a block with a joint Gaussian, within plates; eight times as many outside
            all plates. 0 gives products of scalars.
        paths_up_to: largest number of scalars of a Markov latent's path that has one particle index, and one joint Gaussian with
            what else lies in its plates: for many short chains. 0 gives each state particles of its own.
        enumerate_up_to: largest number of values of a discrete latent that is summed exactly.
        final_particles: of the last weighting; chosen from the size of the model by default.
        tails: degrees of freedom of the Student-t proposal of the last weighting; infinite for a Gaussian.
        chains: sum over the states of a Markov latent one step after the other (``"scan"``) or by products of pairs of steps
            (``"tree"``: more work, depth log2 T); ``"auto"`` takes the tree for few states and on CUDA.
        replicates: of the last weighting; their spread is the standard error of the log evidence. At least 8 by default,
            more where few particles fit into one.
    """

    # Whether a Markov chain is proposed as a whole path; a method that moves its proposals otherwise says no.
    joint_chains: ClassVar[bool] = True

    particles: int | Mapping[str, int] | Literal["auto"] | None = None
    groups: Groups = "auto"
    q: Mapping[Any, Any] | None = None
    start: Start = "prior"
    joint_up_to: int = 12
    paths_up_to: int = 24
    enumerate_up_to: int = 64
    final_particles: int | None = None
    tails: float = 5.0
    replicates: int | None = None
    chains: Literal["auto", "scan", "tree"] = "auto"

    @property
    def wants_sites(self) -> bool:
        """Whether long Normal vectors in plates get sites without being asked; a method that learns them may say yes."""
        return False

    def joint_limit(self, plates: Sequence[str], has_path: bool = False) -> int:
        """Largest number of scalars of a joint Gaussian in these plates; outside all plates one costs next to nothing."""
        limit = max(self.joint_up_to, 0) * (1 if plates else _OUTSIDE)
        return limit + self.paths_up_to if has_path else limit

    def stratifies(self, plates: Sequence[str]) -> bool:
        """Whether particles in these plates are spread evenly instead of drawn one by one."""
        return False

    def __post_init__(self) -> None:
        name = type(self).__name__
        counts = (
            self.particles.values() if isinstance(self.particles, Mapping) else [self.particles]
        )
        for count in counts if self.particles != "auto" else ():
            if count is not None and not _is_count(count):
                raise ModelError(
                    f"{name}(particles=...): expected whole numbers of at least 1, got {count!r}."
                )
        if self.start not in get_args(Start):
            raise ModelError(
                f"{name}(start=...): expected one of {', '.join(get_args(Start))}, got {self.start!r}."
            )
        if not _are_groups(self.groups):
            raise ModelError(
                f"{name}(groups=...): expected 'auto', 'correlation' or groups of latents, got {self.groups!r}."
            )
        if self.chains not in ("auto", "scan", "tree"):
            raise ModelError(
                f"{name}(chains=...): expected 'auto', 'scan' or 'tree', got {self.chains!r}."
            )
        for option in ("replicates", "final_particles"):
            value = getattr(self, option)
            if value is not None and not _is_count(value):
                raise ModelError(
                    f"{name}({option}=...): expected a whole number of at least 1, got {value!r}."
                )
        for option in ("joint_up_to", "paths_up_to", "enumerate_up_to"):
            value = getattr(self, option)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ModelError(
                    f"{name}({option}=...): expected a whole number that is not negative, got {value!r}."
                )
        if not (self.q is None or isinstance(self.q, Mapping)):
            raise ModelError(
                f"{name}(q=...): expected a mapping from latents to proposals, such as {{'x': 'Gamma'}}, got {self.q!r}."
            )
        if not (is_number(self.tails) and self.tails > 0):
            raise ModelError(
                f"{name}(tails=...): expected a positive number or inf, got {self.tails!r}."
            )


def is_number(value: object) -> bool:
    """Whether a value is a number, and not True or False."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _are_groups(groups: object) -> bool:
    if isinstance(groups, str):
        return groups in ("auto", "correlation")
    return isinstance(groups, Sequence) and all(
        isinstance(g, Sequence) and not isinstance(g, str) for g in groups
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
