"""What is computed once, and what is carried from step to step, beside what all methods for networks have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional

from ppl.batches import Batches
from ppl.binding import Bound
from ppl.inference.networks import records as networks
from ppl.inference.networks.products import Product, convolution
from ppl.inference.networks.structure import ProductNode
from ppl.inference.ssvi.options import SSVI
from ppl.inference.ssvi.patterns import KERNELS, Form, Kernel, product
from ppl.inference.ssvi.schedule import Schedule
from ppl.inference.ssvi.structured import Groups


@dataclass(frozen=True, eq=False)
class Layer:
    """An array of weights of which some are active."""

    at: int  # position of the array
    name: str  # of the layer
    form: Form  # of its first use
    groups: Groups | None  # None: weights stand alone
    budget: int  # active weights at the start


@dataclass(frozen=True, eq=False)
class Problem:
    """What ``prepare`` returns."""

    inner: networks.Problem
    options: SSVI
    plan: Schedule
    layers: tuple[Layer, ...]  # sparse arrays alone
    batches: Batches | None
    running: Running

    @property
    def bound(self) -> Bound:
        """The graph and its data."""
        return self.inner.bound

    @property
    def max_iters(self) -> int:
        """Steps that a run may take."""
        return self.inner.max_iters


class State(NamedTuple):
    """All restarts, and what the sets need. Nothing but tensors and numbers."""

    inner: networks.Runs
    kernels: tuple[
        int, ...
    ]  # of every product: position in KERNELS, chosen by a timing when the run began
    still: tuple[int, ...]  # of every restart: updates in a row that hardly moved the sets
    new: tuple[float, ...]  # of every restart: share of new members in the last update


class Running:
    """The kernels that products are built with: those of the state at hand.

    A cache, not a setting: what a state carries decides, so that a run that is continued goes on with the kernels it began with.
    """

    def __init__(self) -> None:
        self.kernels: tuple[int, ...] = ()
        self.of_node: dict[int, Kernel] = {}

    def factory(self, node: ProductNode, indices: Tensor) -> Product:
        """The product of a node by the entries that are kept."""
        return product(self.of_node.get(node.node.id, "dense"), form_of(node), indices)

    def take(self, problem: Problem, kernels: tuple[int, ...]) -> None:
        """Use the kernels of a state."""
        if kernels == self.kernels:
            return
        nodes = problem.inner.network.products
        self.of_node = {p.node.id: KERNELS[k] for p, k in zip(nodes, kernels, strict=True)}
        self.kernels = kernels
        problem.inner.made.clear()


def form_of(node: ProductNode) -> Form:
    """What a product does with its array."""
    if node.kind == "linear":
        return Form("linear", node.shape, functional.linear)
    return Form(node.kind, node.shape, convolution(node), _groups(node))


def _groups(node: ProductNode) -> int:
    places: tuple[Any, ...] = node.node.args
    return int(places[6] if len(places) > 6 else node.node.kwargs.get("groups", 1))


__all__ = ["Layer", "Problem", "Running", "State", "form_of"]
