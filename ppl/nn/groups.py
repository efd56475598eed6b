"""Priors that hold the weights of a unit together: a gate or a scale for every input or output of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ppl.distributions import Bernoulli, Distribution, HalfCauchy, Normal, SpikeSlab
from ppl.errors import ModelError
from ppl.nn.priors import Plain, Prior, Slot, fan_in, slab_of
from ppl.plates import PlateHandle
from ppl.sites import latent
from ppl.value import Value

Unit = Literal["in", "out"]


def group_sparse(over: Unit, rate: Any = 0.5, slab: Any = None) -> Prior:
    """Units that matter with all of their weights or with none: a gate for every unit, a spike beneath it.

    The gate of ``fc1.weight`` is the latent ``fc1.weight.on``, Bernoulli(rate), in the plate ``fc1.in`` or ``fc1.out``.

    Args:
        over: "in": one gate for all weights that read an input (channel); "out": for all weights of an output.
        rate: probability that a unit is on.
        slab: as for :func:`spike_slab`.

    >>> @model
    ... def selection():
    ...     layer = nn.Linear(3, 1, name="fc", prior=nn.group_sparse(over="in", rate=0.2))
    ...     with plate("row"):
    ...         observe("y", Normal(layer(given("x"))[0], 1.0))
    >>> graph = selection.graph({"x": [[1.0, 2.0, 3.0]], "y": [1.0]})
    >>> graph.variables["fc.weight.on"].plates, graph.parents("fc.weight")
    (('fc.in',), ('fc.weight.on',))
    """
    return _GroupSparse(_unit("group_sparse", over), rate, slab)


def group_scale(over: Unit, law: Any = None) -> Prior:
    """Units with a scale of their own, which shrinks all of a unit's weights together; nothing is discrete.

    The scale of ``fc1.weight`` is the latent ``fc1.weight.scale``; a weight is Normal with that times
    ``inputs ** -0.5`` as standard deviation. With a half-Cauchy law this is the horseshoe over units.

    Args:
        over: "in" or "out", as for :func:`group_sparse`.
        law: of a scale; HalfCauchy(1) by default.

    Source: C. Louizos, K. Ullrich, M. Welling. *Bayesian Compression for Deep Learning.* NeurIPS 2017, section 4.2.
    """
    return _GroupScale(_unit("group_scale", over), HalfCauchy(1.0) if law is None else law)


@dataclass(frozen=True)
class _Group(Prior):
    over: Unit

    def unit(self, slot: Slot) -> PlateHandle:
        """The plate of the units that have something in common."""
        if len(slot.plates) < 2:
            raise ModelError(
                f"'{slot.name}' has no plate of inputs and of outputs, so that groups over {self.over!r} mean nothing there. "
                "Group the weights of nn.Linear and nn.Conv2d; use nn.spike_slab or nn.fan_in here."
            )
        return slot.plates[1 if self.over == "in" else 0]

    def of_bias(self) -> Prior:
        return Plain(fan_in)


@dataclass(frozen=True)
class _GroupSparse(_Group):
    rate: Any
    slab: Any

    def above(self, slot: Slot) -> Value:
        with self.unit(slot):
            return latent(f"{slot.name}.on", Bernoulli(self.rate))

    def law(self, slot: Slot, above: Value | None) -> Distribution:
        return SpikeSlab(above, slab=slab_of(self.slab, self.rate, slot.inputs))


@dataclass(frozen=True)
class _GroupScale(_Group):
    scale_law: Any

    def above(self, slot: Slot) -> Value:
        with self.unit(slot):
            return latent(f"{slot.name}.scale", self.scale_law)

    def law(self, slot: Slot, above: Value | None) -> Distribution:
        assert above is not None
        return Normal(0.0, above * slot.inputs**-0.5)


def _unit(word: str, over: Any) -> Unit:
    if over not in ("in", "out"):
        raise ModelError(
            f"nn.{word}: over= is 'in' (a group for each input) or 'out' (for each output), got {over!r}."
        )
    return over


__all__ = ["group_scale", "group_sparse"]
