"""Sparse networks, small: only the active weights, without the units that nothing depends on.

:mod:`ppl.nn.removal` drops rows and columns; what is left of a layer is kept by its active entries, in compressed sparse
rows. The file holds single precision means, half precision logarithms of standard deviations, and indices in as few bytes
as their sizes need.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ppl.errors import DataError
from ppl.graph import Graph
from ppl.nn.export import Network, Parts, mean_of, parts_of
from ppl.nn.removal import Matrix, call_of, remove_units
from ppl.nn.sparse_layers import DenseLayer, SparseLinear, Unchecked, is_sparse, rows_of
from ppl.nn.structure import PRODUCTS, LayerNode, find_layers
from ppl.nn.support import support, weight_arrays
from ppl.operations import Batched
from ppl.passes import upstream

if TYPE_CHECKING:
    from ppl.posterior import Posterior

_FORMAT = "factorppl compressed network"
_TENSORS = ("outputs", "inputs", "starts", "columns", "mean", "log_sd", "bias")
_TEXTS = ("weight", "bias_name", "kind", "shape", "places", "executed", "note")


class Multiplications(NamedTuple):
    """Of one prediction, with one set of weights, for one element of the data."""

    dense: int  # all weights
    active: int  # active weights only
    executed: int  # by the compressed module: convolutions multiply the zeros that are left in their kernels


@dataclass(frozen=True, eq=False)
class SparseLayer:
    """The active weights of one layer; row ``i`` of the sparse matrix is the unit ``outputs[i]``.

    ``columns`` counts through the inputs that are left and, for a convolution, the places of its kernel.
    """

    weight: str  # name of the array
    bias_name: str  # empty where there is none
    kind: str  # "linear", "conv1d", "conv2d"
    shape: tuple[int, ...]  # of the whole array, [outputs, inputs, *kernel]
    outputs: Tensor  # [rows] units that are left
    inputs: Tensor  # inputs that are left
    starts: (
        Tensor | None
    )  # [rows + 1] where each row starts in `columns`; None where nothing is left out of the matrix
    columns: Tensor | None  # [k]
    mean: Tensor  # [k]
    log_sd: Tensor | None  # [k] half precision
    bias: Tensor | None  # [rows]
    places: int  # evaluations of the matrix for one element
    executed: int  # multiplications of the compressed module for one element
    note: str = ""  # why units of the layer before stay that might have gone

    @property
    def active(self) -> int:
        """Weights that are left."""
        return len(self.mean)

    @property
    def multiplications(self) -> Multiplications:
        """Of this layer."""
        dense = math.prod(self.shape) * self.places
        return Multiplications(dense, self.active * self.places, self.executed)

    def dense(self) -> Tensor:
        """The whole array ``[outputs, inputs, *kernel]``, zero where nothing is left."""
        outputs, kernel = self.outputs.long(), math.prod(self.shape[2:])
        if self.starts is None or self.columns is None:
            width = len(self.inputs) * kernel
            rows, at = outputs.repeat_interleave(width), torch.arange(width).repeat(len(outputs))
        else:
            rows = outputs.repeat_interleave(self.starts.long().diff())
            at = self.columns.long()
        column = self.inputs.long()[at // kernel] * kernel + at % kernel
        whole = self.mean.new_zeros(self.shape[0], math.prod(self.shape[1:]))
        whole[rows, column] = self.mean
        return whole.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Compressed:
    """What ``posterior.compress()`` returns: ``print`` it, ``save`` it, call its ``module``.

    Attributes:
        layers: sparse matrices.
        others: means of all other unknowns that the predicted law needs, and fixed covariates.
        module: the compressed network, see :class:`ppl.nn.export.Network`; None where the record was read from a file.
        dense_bytes: of a file with the same quantities of the whole network, in the same precision.
        notes: layers that are kept dense, and why.
    """

    layers: tuple[SparseLayer, ...]
    others: Mapping[str, Tensor]
    module: Network | None
    dense_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """Of the file that :meth:`save` writes, measured by writing it into memory."""
        return len(_file(self))

    @property
    def density(self) -> float:
        """Weights that are left, as a share of all weights of these layers."""
        total = sum(math.prod(x.shape) for x in self.layers)
        return sum(x.active for x in self.layers) / max(total, 1)

    @property
    def multiplications(self) -> Multiplications:
        """Of these layers together."""
        each = [x.multiplications for x in self.layers]
        return Multiplications(*(sum(column) for column in zip(*each, strict=True)))

    def arrays(self) -> dict[str, Tensor]:
        """Dense arrays of an equivalent network, by the names of ``posterior.to_module().state_dict()``."""
        found = dict(self.others)
        for x in self.layers:
            found[x.weight] = x.dense()
            if x.bias is not None:
                whole = x.bias.new_zeros(x.shape[0])
                whole[x.outputs.long()] = x.bias
                found[x.bias_name] = whole
        return found

    def save(self, file: str | Path) -> None:
        """Write the matrices: tensors and JSON. :func:`load_compressed` reads them back."""
        Path(file).write_bytes(_file(self))

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [
            ("", "weights", "left", "units", "inputs", "multiplications")
        ]
        rows += [_row(x) for x in self.layers]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        size, total = self.bytes, self.multiplications
        facts = [
            "",
            f"density {self.density:.4f}; {size:,} bytes on disk, {self.dense_bytes:,} dense "
            f"({self.dense_bytes / size:.1f} times)",
            f"one prediction: {total.active:,} multiplications by active weights of {total.dense:,} "
            f"({total.dense / max(total.active, 1):.1f} times fewer); the module does {total.executed:,}",
        ]
        notes = [f"{x.weight}: {x.note}" for x in self.layers if x.note]
        return "\n".join([*table, *facts, *notes, *self.notes])

    __repr__ = __str__


def compress(posterior: Posterior, *, sd: bool = True, site: str | None = None) -> Compressed:
    """The network of a posterior at its mean, without the weights that are exactly zero.

    Its predictions are those of ``posterior.to_module("mean")`` up to single precision, in which means are kept.

    Args:
        posterior: of a fit by any method; a dense one stays dense.
        sd: whether standard deviations are kept, too.
        site: the observed site that is predicted; needed where there are several.

    Raises:
        DataError: the model has no linear layer or convolution with weights of its own.
        UnsupportedError: as for ``to_module``.

    >>> @model
    ... def line():
    ...     layer = nn.Linear(2, 1, name="fc")
    ...     with plate("row"):
    ...         observe("y", Normal(layer(given("x"))[0], 0.1))
    >>> posterior = infer(line, {"x": [[1.0, 0.0], [1.0, 1.0]], "y": [2.0, 1.0]}, method="exact")
    >>> print(str(posterior.compress()).splitlines()[1])
    fc.weight  1 x 2    2 of 2 (100.0%)  1 of 1  2 of 2  2 of 2
    """
    parts = parts_of(posterior, site)
    means = {v.name: mean_of(posterior, v.name).detach() for v in parts.unknown}
    matrices, notes = _matrices(posterior, parts, means)
    if not matrices:
        raise DataError(
            "compress: no linear layer or convolution of the model has weights that are latents or params of one network. "
            f"Use posterior.to_module(). {' '.join(notes)}".rstrip()
        )
    norms = remove_units(
        parts.graph, tuple(parts.arguments.values()), matrices, means | dict(parts.fixed)
    )
    products = {m.layer.node: _product(parts, m) for m in matrices}
    layers = tuple(_stored(posterior, m, products[m.layer.node], sd) for m in matrices)
    taken = {n for x in layers for n in (x.weight, x.bias_name)}
    others = {n: x for n, x in (*means.items(), *parts.fixed.items()) if n not in taken}
    functions: dict[int, Any] = {
        m.layer.node: (products[m.layer.node], m.layer.inputs) for m in matrices
    }
    short, unchecked = _norms(parts.graph, norms, others)
    module = Network(
        parts.graph, parts.arguments, parts.inputs, others | short, (), functions | unchecked
    )
    stored = {n: _single(x) for n, x in others.items()}
    dense = _dense_bytes(posterior, layers, means, stored)
    return Compressed(layers, stored, module, dense, tuple(notes))


def load_compressed(file: str | Path) -> Compressed:
    """Read what ``posterior.compress().save(file)`` wrote.

    ``arrays()`` of the result goes into a module of the same model: ``module.load_state_dict(found.arrays())``.

    Raises:
        DataError: no such file, or another kind of file.
    """
    wrong = f"'{file}' is not a compressed network. Expected what posterior.compress().save(file) writes."
    if not Path(file).is_file() or not zipfile.is_zipfile(file):
        raise DataError(wrong)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise DataError(wrong) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DataError(wrong)
    about = json.loads(content["about"])
    layers = []
    for i, text in enumerate(about["layers"]):
        tensors = {k: content["layers"][str(i)].get(k) for k in _TENSORS}
        layers.append(SparseLayer(**{**text, "shape": tuple(text["shape"])}, **tensors))
    notes = tuple(about["notes"])
    return Compressed(tuple(layers), content["others"], None, about["dense_bytes"], notes)


# ---- which layers ------------------------------------------------------------------------------------------------------


def _matrices(
    posterior: Posterior, parts: Parts, means: Mapping[str, Tensor]
) -> tuple[list[Matrix], list[str]]:
    """The layers that can be compressed, and a line for each that cannot."""
    found = [x for x in find_layers(posterior.graph) if parts.graph.nodes[x.node].op == "call"]
    found = [x for x in found if parts.graph.nodes[x.node].name != "left out"]
    active = support(posterior)
    matrices, notes = [], []
    for layer in found:
        if not {w.variable for w in layer.arrays.values()} & set(weight_arrays(posterior.graph)):
            continue  # norms
        reason = _reason(layer, found, means)
        if reason:
            notes.append(f"{layer.name} is kept dense: {reason}")
            continue
        matrices.append(_matrix(layer, means, active))
    return matrices, notes


def _reason(layer: LayerNode, layers: Sequence[LayerNode], means: Mapping[str, Tensor]) -> str:
    weight, bias = layer.weight, layer.bias
    if layer.kind not in PRODUCTS or weight is None:
        return "the inside of a lifted module is not known"
    own = [w for w in (weight, bias) if w is not None]
    if any(w.around for w in own):
        return "it is a family of networks"
    if weight.variable not in means or (bias is not None and bias.variable not in means):
        return "its weights or biases are computed, or constants"
    if any(tuple(means[w.variable].shape) != w.shape for w in own):
        return "its weights are rearranged before use"
    uses = [w.variable for x in layers for w in x.arrays.values()]
    if any(uses.count(w.variable) > 1 for w in own):
        return "its weights are used more than once"
    return ""


def _matrix(layer: LayerNode, means: Mapping[str, Tensor], active: Mapping[str, Tensor]) -> Matrix:
    assert layer.weight is not None
    mean = means[layer.weight.variable]
    mask = torch.zeros(mean.numel(), dtype=torch.bool, device=mean.device)
    mask[active[layer.weight.variable]] = True
    mask = mask.reshape(mean.shape)
    rows, columns = (
        torch.ones(size, dtype=torch.bool, device=mean.device) for size in mean.shape[:2]
    )
    bias = None if layer.bias is None else means[layer.bias.variable].clone()
    return Matrix(layer, torch.where(mask, mean, 0.0), mask, bias, rows, columns)


# ---- what is kept ------------------------------------------------------------------------------------------------------


def _product(parts: Parts, m: Matrix) -> SparseLinear | DenseLayer:
    """The module of what is left, with means as the file has them."""
    weight, active = _single(m.small(m.weight)).to(m.weight), m.small(m.active)
    bias = None if m.bias is None else _single(m.bias[m.outputs]).to(m.weight)
    if m.layer.kind == "linear" and is_sparse(active):
        return SparseLinear(weight, active, bias)
    return DenseLayer(m.layer.kind, weight, bias, *call_of(parts.graph.nodes[m.layer.node]))


def _norms(
    graph: Graph, norms: Mapping[int, Tensor], arrays: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[int, Any]]:
    """Arrays of norms for the channels that stay, and their functions, by node."""
    short, functions = {}, {}
    for i, kept in norms.items():
        node = graph.nodes[i]
        assert isinstance(node.func, Batched)
        functions[i] = (Unchecked(node.func.run), node.operands())
        for operand in node.operands()[1:]:
            for name in upstream(graph, operand):
                short[name] = arrays[name][kept]
    return short, functions


def _stored(
    posterior: Posterior, m: Matrix, product: SparseLinear | DenseLayer, sd: bool
) -> SparseLayer:
    assert m.layer.weight is not None
    name, shape = m.layer.weight.variable, tuple(m.weight.shape)
    places = m.layer.multiplications // math.prod(shape)
    active = m.small(m.active)
    starts, columns = rows_of(active.flatten(1))
    is_full = bool(active.all())
    spread = None
    if sd and name not in posterior.params:
        spread = m.small(posterior.sd(name).reshape(shape))[active].log().half().cpu()
    return SparseLayer(
        name,
        m.layer.bias.variable if m.layer.bias is not None else "",
        m.layer.kind,
        shape,
        _whole(m.outputs.nonzero().squeeze(-1), shape[0]),
        _whole(m.inputs.nonzero().squeeze(-1), shape[1]),
        None if is_full else _whole(starts, len(columns) + 1),
        None if is_full else _whole(columns, math.prod(shape[1:])),
        _single(m.small(m.weight)[active]),
        spread,
        None if m.bias is None else _single(m.bias[m.outputs]),
        places,
        product.multiplications * places,
        m.note,
    )


def _whole(index: Tensor, below: int) -> Tensor:
    return index.to("cpu", torch.int16 if below < 2**15 else torch.int32)


def _single(x: Tensor) -> Tensor:
    x = x.detach().cpu()
    return (x.float() if x.is_floating_point() else x).clone()


def _dense_bytes(
    posterior: Posterior,
    layers: Sequence[SparseLayer],
    means: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
) -> int:
    arrays = {n: _single(means[n]) for x in layers for n in (x.weight, x.bias_name) if n}
    spreads = {
        x.weight: posterior.sd(x.weight).half().cpu() for x in layers if x.log_sd is not None
    }
    return len(_written({"means": arrays, "log_sd": spreads, "others": dict(others)}))


def _file(found: Compressed) -> bytes:
    about = {
        "layers": [{k: getattr(x, k) for k in _TEXTS} for x in found.layers],
        "dense_bytes": found.dense_bytes,
        "notes": list(found.notes),
    }
    return _written(
        {
            "format": _FORMAT,
            "about": json.dumps(about),
            "layers": {str(i): _tensors(x) for i, x in enumerate(found.layers)},
            "others": dict(found.others),
        }
    )


def _tensors(layer: SparseLayer) -> dict[str, Tensor]:
    found: dict[str, Any] = {k: getattr(layer, k) for k in _TENSORS}
    return {k: t for k, t in found.items() if t is not None}


def _written(content: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(dict(content), buffer)
    return buffer.getvalue()


def _row(x: SparseLayer) -> tuple[str, ...]:
    total = math.prod(x.shape)
    return (
        x.weight,
        " x ".join(map(str, x.shape)),
        f"{x.active:,} of {total:,} ({x.active / total:.1%})",
        f"{len(x.outputs)} of {x.shape[0]}",
        f"{len(x.inputs)} of {x.shape[1]}",
        f"{x.multiplications.active:,} of {x.multiplications.dense:,}",
    )


__all__ = ["Compressed", "Multiplications", "SparseLayer", "compress", "load_compressed"]
