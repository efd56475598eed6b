"""Whether covariates are legal where they stand as parameters of laws: scales positive, probabilities below one.

A law computes with an illegal parameter without a word: a Normal of scale -1 has the density of one of scale 1 up to its
sign, and a scale of zero makes a row infinite. So they are looked at when data is bound.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from ppl.distributions.base import Distribution
from ppl.graph import Graph, Law, Ref, Variable


class Illegal(NamedTuple):
    """A covariate with entries that a law does not take."""

    variable: Variable
    use: str  # "the scale of Normal"
    rule: Any  # a constraint
    bad: Tensor  # bool, [*plates, *what is left of the event]


def illegal_arguments(graph: Graph, values: Mapping[str, Tensor]) -> Iterator[Illegal]:
    """Covariates of ``values`` that are a parameter of a law as they stand, and break its constraint.

    Args:
        graph: a model.
        values: arrays ``[*plates, *event]`` of the covariates by name.
    """
    for factor in graph.factors.values():
        laws = [factor.law, factor.chain[1] if factor.chain else None]
        for law in laws:
            if law is not None:
                yield from _illegal(graph, law, values)


def _illegal(graph: Graph, law: Law, values: Mapping[str, Tensor]) -> Iterator[Illegal]:
    for leaf, argument in zip(law.family.leaves(), law.arguments, strict=True):
        node = graph.nodes[argument.id] if isinstance(argument, Ref) else None
        if node is None or node.op != "variable" or node.name not in values:
            continue
        variable, tensor, rule = graph.variables[node.name], values[node.name], None
        if variable.role == "given" and tensor.layout == torch.strided:
            rule = rule_of(law.family, leaf.path)
        if rule is None or rule.event_dim > len(variable.event_shape):
            continue
        bad = ~rule.check(tensor)
        if bool(bad.any()):
            yield Illegal(variable, f"the {leaf.path} of {type(law.family).__name__}", rule, bad)


def rule_of(family: Distribution, path: str) -> Any:
    """The constraint on a parameter; None where there is none to check.

    >>> from ppl import Normal
    >>> rule_of(Normal(0.0, 1.0), "scale")
    GreaterThan(lower_bound=0.0)
    """
    owner: Any = family
    *outer, name = path.split(".")
    for part in outer:
        owner = owner[int(part)] if isinstance(owner, tuple) else getattr(owner, part)
    rule = getattr(owner, "arg_constraints", {}).get(name)
    is_rule = isinstance(rule, constraints.Constraint) and not constraints.is_dependent(rule)
    return rule if is_rule else None


__all__ = ["Illegal", "illegal_arguments", "rule_of"]
