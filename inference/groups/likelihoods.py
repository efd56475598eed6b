"""Laws that are no Gaussian, and free log-densities, as rows.

What a row linearises is not the law's parameter but what stands below its link: of ``Poisson(f.exp())`` it is ``f``. The
link becomes part of the density, whose second derivative is then the curvature of the model itself wherever ``f`` is
affine; of the rate alone it would be that of a model with another link, and zero for a count of zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppl import operations
from ppl.binding import Bound
from ppl.graph import Law, Node, Ref, substitute
from ppl.inference.groups import losses
from ppl.inference.groups.entries import entries
from ppl.inference.groups.laws import Arguments, Density, Free, Peeled, Values, peel
from ppl.inference.groups.parts import Part
from ppl.inference.groups.recorder import Recorder
from ppl.inference.groups.records import Family
from ppl.inference.groups.rows import Walk
from ppl.passes import upstream

_WHOLE = frozenset(("softmax", "log_softmax"))
Chain = Sequence[tuple[Node, int]]  # links, outermost first, and the node that each is applied to


def general(bound: Bound, part: Part, law: Law, walk: Walk) -> dict[str, Any]:
    """Fields of the group of any law, by its log-density."""
    peeled = peel(law)
    if any(reads(bound, k) for k in peeled.keeps):
        peeled = Peeled(law.family, law.arguments)
    family = peeled.family
    items = [part.factor.value, *peeled.arguments]
    made = [walk.visit(i) for i in items]
    batch_rank = walk.rank(made[0]) - family.event_dim
    batch = walk.event(made[0])[:batch_rank]
    ranks = [walk.rank(made[0]), *(batch_rank + x.event_dim for x in family.leaves())]
    varying = tuple(i for i, item in enumerate(items) if reads(bound, item))
    rest = [i for i in range(len(items)) if i not in varying]
    cuts = [cut(walk, made[i], is_whole=not batch) for i in varying]
    events = [_padded(walk.event(made[i]), ranks[i])[batch_rank:] for i in varying]
    below = walk.compile([inner for inner, _ in cuts], [ranks[i] for i in varying])
    arguments = Arguments(below, batch, tuple(events), part.rows)
    tops = [
        linked(walk, chain, n, (*batch, *event))
        for n, ((_, chain), event) in enumerate(zip(cuts, events, strict=True))
    ]
    links = walk.compile(tops, [ranks[i] for i in varying])
    constants = walk.compile([made[i] for i in rest], [ranks[i] for i in rest])
    density = Density(family, arguments, varying, links, constants)
    keep, _ = entries(bound, part, walk, peeled.keeps, family.event_dim, batch)
    if keep is not None:
        keep = keep.reshape(part.rows, -1).repeat_interleave(arguments.block, 1)
    return {
        "norm": _without_norm(bound, part),
        "function": arguments,
        "outputs_width": math.prod(batch) * arguments.block,
        "is_affine": walk.is_affine(*(inner for inner, _ in cuts)),
        "loss": losses.LogDensity(density, block=arguments.block),
        "keep": keep,
        "params": tuple(dict.fromkeys((*below.params, *links.params, *constants.params))),
    }


def free(part: Part, walk: Walk, families: Mapping[str, Family]) -> dict[str, Any]:
    """Fields of the group of a log-density without a law, as a function of the values of its slots."""
    value = walk.visit(part.factor.value)
    expression = walk.compile([value], [walk.rank(value)])
    shapes = tuple((s.width, *families[s.family].event_shape) for s in walk.slots)
    width = sum(map(math.prod, shapes))
    return {
        "norm": _without_norm(walk.bound, part),
        "function": Values(part.rows),
        "outputs_width": width,
        "is_affine": True,
        "loss": losses.LogDensity(Free(expression, shapes), block=width),
        "keep": None if walk.valid is None else walk.valid.to(walk.bound.dtype),
        "params": expression.params,
    }


def reads(bound: Bound, item: Any) -> bool:
    """Whether an item of the graph depends on a latent."""
    names = {v.name for v in bound.graph.latents}
    return isinstance(item, Ref) and bool(upstream(bound.graph, item.id) & names)


# ---- links -------------------------------------------------------------------------------------


def cut(recorder: Recorder, item: Ref, *, is_whole: bool = False) -> tuple[Ref, Chain]:
    """What stands below the links of an argument, and the links: pointwise calls of one operand that varies.

    Where an event ``is_whole``, not one of several draws, a softmax of it is a link too.
    """
    links = operations.POINTWISE | _WHOLE if is_whole else operations.POINTWISE
    chain: list[tuple[Node, int]] = []
    while not recorder.is_affine(item):
        node = recorder.node(item)
        varying = {i for i in node.operands() if recorder.reads_slots(Ref(i))}
        if node.op != "call" or node.name not in links or len(varying) != 1:
            break
        (inner,) = varying
        if recorder.event(Ref(inner)) != recorder.event(item):
            break
        chain.append((node, inner))
        item = Ref(inner)
    return item, chain


def linked(recorder: Recorder, chain: Chain, number: int, event: tuple[int, ...]) -> Ref:
    """The links applied to entry ``number``."""
    made = recorder.entry(number, event)
    for node, inner in reversed(chain):

        def replaced(leaf: Any, inner: int = inner, by: Ref = made) -> Any:
            return by if isinstance(leaf, Ref) and leaf.id == inner else leaf

        args, kwargs = substitute(node.args, replaced), substitute(node.kwargs, replaced)
        made = recorder.add(node, args=args, kwargs=kwargs, event_shape=event)
    return made


def _padded(event: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(event)) + event


def _without_norm(bound: Bound, part: Part) -> Callable[[Any], Tensor]:
    """The energy of a log-density holds all of its constants."""
    zeros = torch.zeros(part.rows, dtype=bound.dtype, device=bound.device)
    return lambda params: zeros


__all__ = ["cut", "free", "general", "linked", "reads"]
