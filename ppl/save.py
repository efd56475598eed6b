"""Keep a posterior in a file of plain tensors and JSON: no pickled objects, so no code in it."""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppl import marginals as mg
from ppl.binding import Bound
from ppl.columns import Column, Columns, quiet
from ppl.continual import with_laws
from ppl.diagnostics import Diagnostics
from ppl.errors import DataError, PPLError
from ppl.marginals import Marginal
from ppl.model import Model
from ppl.nn.structure import buffers
from ppl.posterior import Evidence, Independent, Posterior
from ppl.streams import Streams

_FORMAT = "factorppl posterior"
_VERSION = 1
_POOL = 2000  # joint draws in a file
_POOL_NUMBERS = (
    10**8
)  # a posterior of very many numbers keeps fewer draws, so that the pool stays below 1 GB


def save(posterior: Posterior, file: str | Path) -> None:
    """Write a posterior: marginals, joint draws, diagnostics, and the data that predictions need.

    Where all latents are independent (a network by mean-field inference) the marginals say all, and no draws are kept.

    Args:
        posterior: of a fit.
        file: written whole or not at all.
    """
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "about": json.dumps(_about(posterior)),
        "marginals": {n: _cpu(_tensors(m)) for n, m in posterior.marginals.items()},
        "prior": {n: _cpu(_tensors(m)) for n, m in posterior.bound.prior.items()},
        "params": _cpu(posterior.params),
        "pool": _cpu(_pool(posterior)),
        "trace": _cpu(posterior.trace),
        "ess": _cpu(posterior.diagnostics.ess),
        "pareto_k": _cpu(posterior.diagnostics.pareto_k),
        "columns": _cpu(_arrays(posterior.bound)),
        "buffers": _cpu(_buffers(posterior.bound)),
    }
    target = Path(file)
    partial = target.with_name(target.name + ".part")
    torch.save(content, partial)
    partial.replace(target)


def load(file: str | Path, model: Model[Any]) -> Posterior:
    """Read what ``posterior.save(file)`` wrote, onto the CPU.

    ``samples(n)`` reshuffles the joint draws of the file (2000, fewer for very large posteriors):
    a larger ``n`` repeats them and does not add information. The posterior cannot be resumed.

    Args:
        file: name of the file.
        model: the model that was fitted, with the same structural parameters.

    Raises:
        DataError: no such file, another kind of file, a damaged one, or another model's.
    """
    content = _read(Path(file))
    try:
        about = json.loads(content["about"])
        columns = _columns(about["columns"], content["columns"])
        bound = _bind(file, model, content, about, columns)
        return _rebuilt(model, bound, content, about)
    except PPLError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(
            f"'{file}' is damaged: {type(error).__name__}: {error}. Expected what posterior.save "
            "writes; save it again."
        ) from error


# ---- what is written --------------------------------------------------------------------------


def _about(posterior: Posterior) -> dict[str, Any]:
    bound, quality = posterior.bound, posterior.diagnostics
    return {
        "model": bound.graph.name,
        "fingerprint": bound.graph.fingerprint(),
        "method": posterior.method,
        "why": posterior.why,
        "seed": posterior.seed,
        "kinds": {n: _kind(m) for n, m in posterior.marginals.items()},
        "prior_kinds": {n: _kind(m) for n, m in bound.prior.items()},
        "manifolds": {
            n: m.manifold
            for n, m in (*posterior.marginals.items(), *bound.prior.items())
            if isinstance(m, mg.JointGaussian)
        },
        "shapes": {
            n: list(m.shape)
            for n, m in posterior.marginals.items()
            if isinstance(m, mg.SparseGaussian)
        },
        "independent": _is_independent(posterior),
        "evidence": None if posterior.log_evidence is None else list(posterior.log_evidence),
        "diagnostics": {
            "converged": quality.converged,
            "iterations": quality.iterations,
            "seconds": quality.seconds,
            "warnings": list(quality.warnings),
            "notes": {str(k): _plain(v) for k, v in quality.notes.items()},
        },
        "dtype": str(bound.dtype).removeprefix("torch."),
        "sizes": {p: bound.size(p) for p in bound.graph.plates},
        "labels": {
            p: [_plain(v) for v in ls]
            for p, ls in bound.labels.items()
            if not isinstance(ls, range)
        },
        "report": list(bound.report),
        "columns": [_describe(c) for c in _used(bound)],
    }


def _kind(marginal: Marginal) -> str:
    return next(kind for kind, record in mg.KINDS.items() if isinstance(marginal, record))


def _tensors(marginal: Marginal) -> dict[str, Tensor]:
    return {k: t for k, t in marginal._asdict().items() if isinstance(t, Tensor)}


def _pool(posterior: Posterior) -> dict[str, Tensor]:
    """Joint draws of the latents; params and deterministic sites are computed from them again."""
    if _is_independent(posterior):
        return {}
    latents = [v.name for v in posterior.graph.latents]
    numbers = sum(math.prod(posterior.bound.shape(posterior.graph.variables[n])) for n in latents)
    n = min(_POOL, max(100, _POOL_NUMBERS // max(numbers, 1)))
    return {name: draw for name, draw in posterior.latent_draws(n).items() if name in latents}


def _is_independent(posterior: Posterior) -> bool:
    return bool(getattr(posterior._sampler, "independent", False))


def _buffers(bound: Bound) -> dict[str, Tensor]:
    """Statistics of batch norms, which the fit has estimated: they are in no column."""
    return {n: bound.values[n] for pair in buffers(bound.graph) for n in pair if n}


def _used(bound: Bound) -> list[Column]:
    """The columns that the model reads: a data frame may have many more."""
    graph = bound.graph
    names = {
        *graph.variables,
        *graph.plates,
        *(c for p in graph.plates.values() for c in p.columns),
    }
    return [c for name in bound.columns for c in bound.columns.all(name) if name in names]


def _arrays(bound: Bound) -> dict[str, Tensor]:
    """Columns of numbers, by position: a name may stand in several tables."""
    return {str(i): c.values for i, c in enumerate(_used(bound)) if isinstance(c.values, Tensor)}


def _describe(column: Column) -> dict[str, Any]:
    coords = column.coords
    return {
        "name": column.name,
        "table": column.table,
        "dims": None if column.dims is None else list(column.dims),
        "coords": None
        if coords is None
        else {d: [_plain(v) for v in vs] for d, vs in coords.items()},
        "categories": None if column.categories is None else [_plain(v) for v in column.categories],
        "text": column.values.tolist() if column.is_text else None,
    }


def _plain(value: Any) -> Any:
    """A value that JSON knows; dates and the like become their text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.generic, Tensor)) and value.ndim == 0:
        value = value.item()
    return value if value is None or isinstance(value, (str, bool, int, float)) else str(value)


def _cpu(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    # A copy: a view would drag the whole of the storage that it looks at into the file.
    return {name: _copied(torch.as_tensor(t).detach().cpu()) for name, t in tensors.items()}


def _copied(tensor: Tensor) -> Tensor:
    return (tensor.contiguous() if tensor.layout == torch.strided else tensor).clone()


# ---- what is read -----------------------------------------------------------------------------


def _read(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise DataError(
            f"'{file}': there is no such file. Write one with posterior.save('{file.name}')."
        )
    # torch.save writes zip archives; anything else would reach torch's reader of old pickles.
    content = _unpacked(file) if zipfile.is_zipfile(file) else None
    if content is None:
        raise DataError(
            f"'{file}' is damaged, or not a posterior. Expected what posterior.save writes; save "
            "it again."
        )
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DataError(
            f"'{file}' holds something else than a posterior. Expected what posterior.save writes."
        )
    if content.get("version") != _VERSION:
        raise DataError(
            f"'{file}' has format version {content.get('version')}, this version of the package "
            f"reads {_VERSION}. "
            "Update the package, or save the posterior again."
        )
    return content


def _unpacked(file: Path) -> Any:
    """What is in an archive of tensors; None when it cannot be read, or holds other objects."""
    try:
        with quiet():
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError):
        return None


def _columns(described: Sequence[Mapping[str, Any]], arrays: Mapping[str, Tensor]) -> Columns:
    return Columns(
        [
            Column(
                c["name"],
                arrays[str(i)] if c["text"] is None else np.asarray(c["text"], dtype=str),
                c["table"],
                None if c["dims"] is None else tuple(c["dims"]),
                c["coords"],
                None if c["categories"] is None else tuple(c["categories"]),
            )
            for i, c in enumerate(described)
        ]
    )


def _bind(
    file: str | Path,
    model: Model[Any],
    content: Mapping[str, Any],
    about: Mapping[str, Any],
    columns: Columns,
) -> Bound:
    labels, sizes = about["labels"], about["sizes"]
    other = (
        f"'{file}' is a posterior of model '{about['model']}' (fingerprint "
        f"{about['fingerprint']}), but model "
        f"'{model.name}' %s. Load it with the model that was fitted, with the same structural "
        "parameters."
    )
    try:
        bound = model.bind(
            columns,
            sizes={p: size for p, size in sizes.items() if p not in labels},
            labels=labels,
            dtype=getattr(torch, about["dtype"]),
            device="cpu",
        )
        laws = {n: _marginal(content["prior"][n], n, kind, about) for n, kind in _priors(about)}
        bound = with_laws(bound, laws, bound.labels) if laws else bound
    except PPLError as error:
        raise DataError(other % f"does not fit its data: {error}") from error
    found = bound.graph.fingerprint()
    if found != about["fingerprint"]:
        raise DataError(other % f"has the fingerprint {found}")
    bound = replace(bound, values={**bound.values, **content.get("buffers", {})})
    return replace(bound, report=tuple(about["report"]))


def _rebuilt(
    model: Model[Any], bound: Bound, content: Mapping[str, Any], about: Mapping[str, Any]
) -> Posterior:
    quality, evidence = about["diagnostics"], about["evidence"]
    marginals = {
        n: _marginal(content["marginals"][n], n, kind, about) for n, kind in about["kinds"].items()
    }
    independent = about.get("independent", False)
    posterior = Posterior(
        bound,
        marginals,
        method=about["method"],
        sampler=Independent(marginals) if independent else Pool(content["pool"]),
        log_evidence=None if evidence is None else Evidence(*evidence),
        diagnostics=Diagnostics(
            content["ess"],
            content["pareto_k"],
            quality["converged"],
            quality["iterations"],
            quality["seconds"],
            tuple(quality["warnings"]),
            quality["notes"],
        ),
        params=content["params"],
        seed=about["seed"],
    )
    posterior.why, posterior.model, posterior.trace = about["why"], model, dict(content["trace"])
    return posterior


def _priors(about: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Latents whose laws came from an earlier posterior, and the kinds of their records."""
    return list(about.get("prior_kinds", {}).items())


def _marginal(tensors: Mapping[str, Tensor], name: str, kind: str, about: Mapping[str, Any]) -> Any:
    more = {"manifold": about["manifolds"][name]} if kind == "joint" else {}
    more |= {"shape": tuple(about["shapes"][name])} if kind == "sparse" else {}
    return mg.KINDS[kind](**tensors, **more)


class Pool:
    """A sampler that deals stored draws, reshuffled: whole rounds before any repeats."""

    def __init__(self, draws: Mapping[str, Tensor]) -> None:
        self.draws = draws

    def __call__(self, n: int, streams: Streams) -> dict[str, Tensor]:
        if not self.draws:
            return {}
        size = len(next(iter(self.draws.values())))
        generator = streams.of("pool")
        rounds = [torch.randperm(size, generator=generator) for _ in range(-(-n // size))]
        order = torch.cat(rounds)[:n]
        return {name: draw[order] for name, draw in self.draws.items()}
