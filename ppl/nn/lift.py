"""Any ``torch.nn.Module`` as one node of a model, its parameters as latents.

The module is evaluated by ``torch.func.functional_call`` with the weights of the model in the place of its own.
The plates of its inputs become the batch axis that torch's modules take first; axes that weights have (particles,
the users of a family) are put around it by ``vmap``, or in a loop where the module does not allow that.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from ppl.errors import ModelError, PPLError
from ppl.nn.base import Layer, Plates
from ppl.nn.opaque import Opaque
from ppl.nn.priors import Prior, Slot, as_prior, fan_in
from ppl.trace import Trace
from ppl.value import prototype

if TYPE_CHECKING:
    pass

_SCALES = (_NormBase, torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.RMSNorm)


class Lifted(Layer):
    """What :func:`lift` returns: a function of one element."""

    def __init__(
        self, name: str, module: torch.nn.Module, prior: Any, batched: bool, plates: Plates
    ) -> None:
        super().__init__(name, plates)
        self.label = f"nn.lift('{name}')"
        _check_module(self.label, module)
        self.module, self.batched = module, batched
        patterns = prior if isinstance(prior, Mapping) else {"*": prior}
        self.priors = {p: as_prior(law, fan_in, self.label) for p, law in patterns.items()}
        self.names = [n for n, _ in module.named_parameters()]
        unused = [p for p in self.priors if not fnmatch.filter(self.names, p)]
        if unused and isinstance(prior, Mapping):
            raise ModelError(
                f"{self.label}: no parameter is called {unused[0]!r}. Parameters: {', '.join(self.names)}."
            )

    def slots(self, trace: Trace) -> tuple[tuple[Slot, Prior] | None, ...]:
        return tuple(self._slot(name) for name in self.names)

    def __call__(self, *inputs: Tensor, **options: Any) -> Any:
        """The module at one element; options are plain Python values such as ``need_weights=False``."""
        call = _Call(self.label, self.module, self.names, self.batched, options)
        axes, tree = call.probe([prototype(x) for x in inputs])
        weights = self.arrays()
        run = Opaque(self.label, call, axes)
        buffers = tuple(b.detach() for b in call.buffers.values())
        found = run(tuple(inputs), weights, buffers)
        leaves = list(found) if isinstance(found, tuple) else [found]
        return pytree.tree_unflatten(leaves, tree)

    def _slot(self, name: str) -> tuple[Slot, Prior]:
        own, _, last = name.rpartition(".")
        module = self.module.get_submodule(own)
        start = self.module.get_parameter(name).detach()
        shapes = [p.shape for p in module.parameters(recurse=False) if p.ndim > 1]
        around = start.shape if start.ndim > 1 else max(shapes, key=_inputs, default=None)
        centre = float(last == "weight" and isinstance(module, _SCALES))
        meet = 1 if around is None else _inputs(around)
        prior = next((p for k, p in self.priors.items() if fnmatch.fnmatch(name, k)), None)
        slot = Slot(f"{self.name}.{name}", (), tuple(start.shape), meet, centre, start.clone())
        return slot, as_prior(prior, fan_in, self.label)


def lift(
    name: str,
    module: torch.nn.Module,
    *,
    prior: Any = None,
    batched: bool = True,
    plates: Plates = None,
) -> Lifted:
    """Make a torch module Bayesian: one opaque node, a latent for each of its parameters.

    Sites are ``name.<parameter>``, such as ``net.layer1.weight``. Buffers are constants. Methods that look inside a
    function (gbp, laplace, amp) refuse the node by its name.

    Args:
        name: of the node.
        module: in evaluation mode, where it has batch norms or dropout: call ``module.eval()``.
        prior: as for :class:`Linear`, for every parameter; or a mapping from patterns of names (``"head.*"``) to
            priors, the first that fits, :func:`fan_in` where none does. A scale of a norm layer lies around one.
            :func:`point` and :func:`fixed` start from what the module holds.
        batched: whether the module takes a batch of elements as the first axis of every input, as torch's modules do
            (recurrent ones and attention with ``batch_first=True``). Otherwise it takes one element.
        plates: as for :class:`Linear`.

    Returns:
        A function of one element; it returns what the module returns, tuples too.

    Raises:
        ModelError: the module draws random numbers, counts batches, or mixes the elements of a batch.

    >>> module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    >>> @model
    ... def regression():
    ...     net = nn.lift("net", module, prior=nn.isotropic(1.0))
    ...     with plate("row"):
    ...         observe("y", Normal(net(given("x"))[0], 1.0))
    >>> graph = regression.graph({"x": torch.zeros(4, 2), "y": torch.zeros(4)})
    >>> [v.name for v in graph.latents]
    ['net.0.weight', 'net.0.bias', 'net.2.weight', 'net.2.bias']
    """
    return Lifted(name, module, prior, batched, plates)


class _Call:
    """The module as a pure function of inputs, weights and buffers."""

    def __init__(
        self,
        label: str,
        module: torch.nn.Module,
        names: Sequence[str],
        batched: bool,
        options: Mapping[str, Any],
    ) -> None:
        self.label, self.module, self.names, self.batched = label, module, names, batched
        self.options = dict(options)
        self.buffers = dict(module.named_buffers())

    def leaves(
        self, inputs: Sequence[Tensor], weights: Sequence[Tensor], buffers: Sequence[Tensor]
    ) -> tuple[list[Tensor], Any]:
        """The tensors that the module returns, and the tree that they stood in."""
        given = dict(zip(self.names, weights, strict=True))
        given |= dict(zip(self.buffers, buffers, strict=True))
        out = torch.func.functional_call(self.module, given, tuple(inputs), self.options)
        return pytree.tree_flatten(out)

    def probe(self, inputs: Sequence[Tensor]) -> tuple[tuple[int, ...], Any]:
        """The batch axis of every tensor that is returned, and their tree; checks that elements do not mix."""
        reals = [p.detach().double() for p in self.module.parameters()]
        buffers = [_double(b) for b in self.buffers.values()]
        inputs = [_double(x) for x in inputs]
        if not self.batched:
            leaves, tree = self._tried(inputs, reals, buffers)
            return (0,) * len(leaves), tree
        other = [_another(x) for x in inputs]
        one, tree = self._tried([x[None] for x in inputs], reals, buffers)
        two, _ = self._tried([torch.stack(xs) for xs in zip(inputs, other, strict=True)], reals, buffers)  # fmt: skip
        axes = tuple(self._axis(a, b) for a, b in zip(one, two, strict=True))
        alone, _ = self._tried([x[None] for x in other], reals, buffers)
        for whole, first, second, at in zip(two, one, alone, axes, strict=True):
            parts = torch.cat([first, second], at)
            if not torch.allclose(whole, parts, rtol=1e-6, atol=1e-9, equal_nan=True):
                raise ModelError(
                    f"{self.label}: the elements of a batch influence each other. Recurrent and attention modules need "
                    "batch_first=True; a module that takes one element needs batched=False."
                )
        return axes, tree

    def _axis(self, one: Tensor, two: Tensor) -> int:
        at = [i for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=False)) if a != b]
        if one.ndim == two.ndim and len(at) == 1 and 2 * one.shape[at[0]] == two.shape[at[0]]:
            return at[0]
        raise ModelError(
            f"{self.label}: a result has shape {list(one.shape)} for one element and {list(two.shape)} for two, so that it is "
            "not clear which axis is the batch. Recurrent modules need batch_first=True; else wrap the module in one that "
            "returns the tensor you need."
        )

    def _tried(self, *args: Any) -> tuple[list[Tensor], Any]:
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            try:
                leaves, tree = self.leaves(*args)
            except PPLError:
                raise
            except Exception as error:
                shapes = ", ".join(str(list(x.shape)) for x in args[0])
                raise ModelError(
                    f"{self.label} failed on inputs of shape {shapes}, the first axis the batch: {error}. Inside a plate, "
                    "code sees one element; a module that takes one element needs batched=False."
                    if self.batched
                    else f"{self.label} failed on one element, inputs of shape {shapes}: {error}."
                ) from None
        if not leaves or not all(isinstance(x, Tensor) for x in leaves):
            raise ModelError(
                f"{self.label} returns something that is no tensor. Wrap the module in one that returns tensors."
            )
        return leaves, tree


def _check_module(label: str, module: Any) -> None:
    if not isinstance(module, torch.nn.Module):
        raise ModelError(
            f"{label}: expected a torch.nn.Module, got {type(module).__name__}. A function of one element needs no lift: call "
            "it in the model."
        )
    if any(torch.nn.parameter.is_lazy(p) for p in module.parameters()):
        raise ModelError(f"{label}: the module has parameters without a shape yet. Call it once.")
    for name, part in module.named_modules():
        place = f"{label}: '{name or type(part).__name__}'"
        if isinstance(part, _NormBase) and part.training:
            raise ModelError(
                f"{place} is a batch norm in training mode, whose elements depend on each other. Call module.eval(), which "
                "takes its running statistics as constants; or use GroupNorm, or layers of ppl.nn."
            )
        rate = part.p if isinstance(part, _DropoutNd) else getattr(part, "dropout", 0.0)
        if part.training and isinstance(rate, float) and rate > 0:
            raise ModelError(
                f"{place} drops out entries at random, and a model draws nothing but its latents. Call module.eval()."
            )


def _double(x: Tensor) -> Tensor:
    return x.detach().double() if x.is_floating_point() else x.detach()


def _another(x: Tensor) -> Tensor:
    """An element that differs from ``x``, of legal values."""
    if not x.is_floating_point():
        return x.flip(tuple(range(x.ndim)))
    generator = torch.Generator().manual_seed(0)
    return x + torch.randn(x.shape, generator=generator, dtype=x.dtype)


def _inputs(shape: Sequence[int]) -> int:
    return math.prod(shape) // shape[0]


__all__ = ["Lifted", "lift"]
