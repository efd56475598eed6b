"""Forms of a block's proposal beyond one Gaussian or one family: what ``q={...}`` may name.

A form belongs to a whole block: ``q={"level": LinearGaussian(given="mean")}`` proposes ``level`` on its own,
``q={("level", "slope"): ...}`` both together. Latents that a proposal reads lie in the same plates or in outer ones.

>>> from ppl.inference.particles import LinearGaussian, Tied
>>> Tied(LinearGaussian(given="mean"))
Tied(form=LinearGaussian(given=('mean',), index='permutation'), over=None)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch.distributions import constraints

from ppl.errors import ModelError, nearest
from ppl.graph import Graph, Variable

Index = Literal["permutation", "categorical", "nested"]


@dataclass(frozen=True)
class Prior:
    """The latent's own law given particles of its parents; nothing is learned of it.

    Args:
        index: how a particle finds its parents, by a random ``"permutation"`` of them or independently
            (``"categorical"``); drawn anew for every plate element. ``"nested"``: every particle of the parents has particles of
            its own, as many as ``particles`` says of the latent; parents in one block.
        of: those latents of the block that are proposed so; the others share a Gaussian. All by default.
    """

    index: Index = "permutation"
    of: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.of, str):
            object.__setattr__(self, "of", (self.of,))

    def takes(self, name: str) -> bool:
        """Whether a latent of the block is proposed by its own law."""
        return self.of is None or name in self.of


@dataclass(frozen=True)
class Mirrored:
    """A Gaussian on the unconstrained scale and its reflection, half each: for latents whose sign the model does not know.

    Args:
        flips: the latents of the block whose sign the reflection changes; they take all real values.
    """

    flips: str | tuple[str, ...]
    index: Index = "permutation"

    def __post_init__(self) -> None:
        flips = (self.flips,) if isinstance(self.flips, str) else tuple(self.flips)
        object.__setattr__(self, "flips", flips)
        if not flips:
            raise ModelError("Mirrored(flips=...): expected at least one latent, got none.")


@dataclass(frozen=True)
class Tilted:
    """The latent's own law tilted towards the posterior: ``q(z | u)`` proportional to ``p(z | u) exp(delta . T(z))``.

    ``delta`` is learned for every plate element; the law must be an exponential family. It keeps the shape of a hierarchy (a
    funnel) and suits latents of a few dimensions: in many, particles drawn given one parent have no weight under another, and
    ``index="nested"`` is better.

    Args:
        index: as in :class:`Prior`.
    """

    index: Index = "permutation"


@dataclass(frozen=True)
class Sites:
    """A Normal vector in a plate given its parents, times a Gaussian site of low rank for every element.

    ``q(z | u)`` proportional to ``p(z | u) exp(r . z - z' L z / 2)``, nested in the particles of the parents' block, with ``r``
    and ``L`` where Newton's method in expectation puts them ([Opper2009], [Khan2017]). It uses derivatives of the log-likelihood;
    no other form does. Its children are observed, and one element's children read no other element. Long vectors in plates get
    it without being asked.

    Args:
        index: always ``"nested"``.
    """

    index: Index = "nested"


@dataclass(frozen=True)
class LinearGaussian:
    """A Gaussian on the unconstrained scale whose mean is linear in other latents.

    Its density is that of the mixture over the parents' particles. Where the parents are Gaussian too, that mixture is a
    Gaussian, and a proposal without parents does about as well.

    Args:
        given: names of these latents; they are taken on their unconstrained scale.
        index: as in :class:`Prior`.
    """

    given: str | tuple[str, ...]
    index: Index = "permutation"

    def __post_init__(self) -> None:
        given = (self.given,) if isinstance(self.given, str) else tuple(self.given)
        object.__setattr__(self, "given", given)
        if not given:
            raise ModelError("LinearGaussian(given=...): expected at least one latent, got none.")


@dataclass(frozen=True)
class Table:
    """One proposal for each value of a discrete latent.

    Args:
        given: name of a latent with finitely many values, enumerated or sampled.
        family: exponential family of the proposals, by name; None for a Gaussian on the unconstrained scale.
        index: as in :class:`Prior`.
    """

    given: str
    family: str | None = None
    index: Index = "permutation"


@dataclass(frozen=True)
class Tied:
    """One set of parameters for all elements of a plate.

    Args:
        form: what is tied: another form, a family as in ``q``, or None for a Gaussian on the unconstrained scale.
        over: plates to tie over; None for all plates of the block.
    """

    form: Any = None
    over: str | tuple[str, ...] | None = None


@dataclass(frozen=True)
class GaussMarkov:
    """Gaussian on the unconstrained scale given the state before: what chains get without being asked."""

    index: Index = "permutation"


@dataclass(frozen=True)
class Skewed:
    """A joint Gaussian whose marginals are skewed by the sinh-arcsinh map, matched to three moments.

    Blocks that long vectors with sites are nested in get it without being asked.

    Args:
        index: has no meaning here: the proposal reads no other latent.
    """

    index: Index = "permutation"


Form = Prior | Mirrored | Tilted | Sites | Skewed | LinearGaussian | Table | GaussMarkov


# Families that can be tilted, and the sign that each natural parameter must keep (0: any real number).
SIGNS: dict[str, tuple[int, ...]] = {
    "Normal": (0, -1),
    "LogNormal": (0, -1),
    "HalfNormal": (-1,),
    "Exponential": (-1,),
    "Gamma": (1, -1),
    "InverseGamma": (-1, -1),
    "Chi2": (1,),
    "Beta": (1, 1),
    "Dirichlet": (1,),
    "Bernoulli": (0,),
    "Poisson": (0,),
    "Geometric": (-1,),
    "Categorical": (0,),
}


@dataclass(frozen=True)
class Asked:
    """What ``q`` says of one latent."""

    block: tuple[str, ...]  # latents of the key
    form: Form | None = None
    tied: Tied | None = None
    family: Any = None  # a name, a class or a law


def read_forms(q: Mapping[Any, Any] | None, graph: Graph) -> dict[str, Asked]:
    """What ``q`` says, latent by latent.

    Raises:
        ModelError: a latent or a family that is not there, or a form that does not fit.
    """
    latents = {v.name: v for v in graph.latents}
    found: dict[str, Asked] = {}
    for key, value in (q or {}).items():
        names = key if isinstance(key, tuple) else (key,)
        for name in names:
            if name not in latents:
                raise ModelError(
                    f"q=... names '{name}', which is not a latent of the model.{nearest(name, latents)} "
                    f"Latents: {', '.join(latents)}."
                )
            found[name] = _asked(names, value)
    return found


def _asked(names: tuple[str, ...], value: Any) -> Asked:
    if isinstance(value, type) and issubclass(value, (Prior, Tilted, Sites, Tied)):
        value = value()
    tied, value = (value, value.form) if isinstance(value, Tied) else (None, value)
    if isinstance(value, Tied):
        raise ModelError(f"q={{{names}: Tied(Tied(...))}}: one Tied is enough; give it over=...")
    if not isinstance(value, Form):
        return Asked(names, None, tied, value)
    own = ("nested",) if isinstance(value, (Prior, Tilted, Sites)) else ()
    known = own if isinstance(value, Sites) else ("permutation", "categorical", *own)
    if value.index not in known:
        raise ModelError(
            f"q={{{names}: {value}}}: index: expected {' or '.join(map(repr, known))}, got {value.index!r}."
        )
    family = value.family if isinstance(value, Table) else None
    return Asked(names, value, tied, family)


def read_latents(form: Form | None, graph: Graph, names: tuple[str, ...]) -> tuple[str, ...]:
    """The latents that proposals of this form read, for a block of the latents ``names``."""
    if form is None or isinstance(form, (Mirrored, Skewed)):
        return ()
    if isinstance(form, LinearGaussian):
        read = tuple(form.given)
    elif isinstance(form, Table):
        read = (form.given,)
    else:
        own = [n for n in names if not isinstance(form, Prior) or form.takes(n)]
        around = (p for n in own for p in graph.parents(n))
        read = tuple(dict.fromkeys(p for p in around if _is_latent(graph, p)))
    for name in read:
        if not _is_latent(graph, name):
            known = [v.name for v in graph.latents]
            raise ModelError(
                f"q={{{_shown(names)}: {form}}}: '{name}' is not a latent of the model.{nearest(name, known)} "
                f"Latents: {', '.join(known)}."
            )
    return read


def check_form(
    form: Form, graph: Graph, variables: tuple[Variable, ...], read: tuple[str, ...]
) -> None:
    """Refuse what no proposal of this form can do.

    Raises:
        ModelError: with the remedy.
    """
    names = tuple(v.name for v in variables)
    named = form.flips if isinstance(form, Mirrored) else getattr(form, "of", None) or ()
    stray = [n for n in named if n not in names]
    if stray:
        raise ModelError(
            f"q={{{_shown(names)}: {form}}}: '{stray[0]}' is not in the block.{nearest(stray[0], names)} Its latents: "
            f"{', '.join(names)}."
        )
    flips = form.flips if isinstance(form, Mirrored) else ()
    for v in variables if flips else ():
        if v.is_discrete or (v.name in flips and not _is_real(v)):
            raise ModelError(
                f"q={{{_shown(names)}: {form}}}: '{v.name}' does not take all real values, so it has no other sign. "
                "Leave it out of flips=, or out of the block."
            )
    for v in variables if isinstance(form, Tilted) else ():
        law = graph.factors[v.name].law
        family = type(law.family).__name__ if law is not None else "no law"
        if family not in SIGNS:
            raise ModelError(
                f"q={{'{v.name}': Tilted()}}: '{v.name}' has {family}, whose natural parameters are not known here. "
                f"Tilted takes {', '.join(SIGNS)}; use Prior, LinearGaussian or no form."
            )
    for name in read:
        parent = graph.variables[name]
        discrete = parent.is_discrete
        if isinstance(form, LinearGaussian) and discrete:
            raise ModelError(
                f"q={{{_shown(names)}: {form}}}: '{name}' is discrete, so nothing is linear in it. "
                f"Use Table(given='{name}')."
            )
        if isinstance(form, Table) and (parent.cardinality is None or parent.event_shape):
            raise ModelError(
                f"q={{{_shown(names)}: {form}}}: '{name}' has no finite set of values to make a table of. "
                f"Use LinearGaussian(given='{name}')."
            )
    if isinstance(form, LinearGaussian) and any(v.is_discrete for v in variables):
        raise ModelError(
            f"q={{{_shown(names)}: {form}}}: a discrete latent has no Gaussian proposal. Use Table, Tilted or Prior."
        )


def _is_real(v: Variable) -> bool:
    return getattr(v.support, "base_constraint", v.support) is constraints.real


def _is_latent(graph: Graph, name: str) -> bool:
    return name in graph.variables and graph.variables[name].role == "latent"


def _shown(names: tuple[str, ...]) -> str:
    return repr(names[0] if len(names) == 1 else names)
