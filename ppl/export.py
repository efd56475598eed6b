"""Hand a posterior to other libraries: ArviZ (0.x and 1.x alike) and pandas."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppl.binding import Bound
from ppl.errors import UnsupportedError
from ppl.summary import element_names, plates_of

if TYPE_CHECKING:
    from ppl.posterior import Posterior

_DRAWS = ("chain", "draw")


def to_arviz(posterior: Posterior, n: int = 1000) -> Any:
    """What the installed ArviZ uses: ``InferenceData`` before 1.0, an xarray ``DataTree`` since.

    Draws are joint and equally weighted, in one chain (so R-hat is nan). Dimensions are the
    plates, coordinates their labels; a site that has the name of a plate gets ``_index`` behind
    its own. The log evidence and the quality of the fit stand in the attributes of
    ``sample_stats``.

    Args:
        posterior: of a fit.
        n: number of draws.

    Raises:
        UnsupportedError: ArviZ is not installed.
    """
    arviz = _arviz()
    groups = datasets(posterior, n)
    if int(arviz.__version__.split(".")[0]) < 1:
        return arviz.InferenceData(**groups)
    from xarray import DataTree

    return DataTree.from_dict({f"/{name}": dataset for name, dataset in groups.items()})


def to_frame(posterior: Posterior) -> Any:
    """The summary as a pandas data frame, one row a scalar.

    Raises:
        UnsupportedError: pandas is not installed.
    """
    return posterior.summary().to_frame()


def datasets(posterior: Posterior, n: int) -> dict[str, Any]:
    """The groups of an ArviZ object as xarray datasets."""
    bound = posterior.bound
    draws = posterior.samples(n)
    groups = {
        "posterior": _dataset(bound, draws, lead=_DRAWS),
        # ArviZ 0.x drops a group without variables, and its attributes with it.
        "sample_stats": _dataset(bound, {}, attributes=_quality(posterior)).assign(
            weight=(_DRAWS, torch.full((1, n), 1 / n, dtype=torch.float64).numpy()),
            chain=[0],
            draw=range(n),
        ),
        "log_likelihood": _log_likelihood(posterior, n),
        "observed_data": _dataset(bound, _observed(bound)),
        "constant_data": _dataset(
            bound, {v.name: bound.values[v.name] for v in bound.graph.role("given")}
        ),
    }
    return {name: dataset for name, dataset in groups.items() if dataset.data_vars}


def _dataset(
    bound: Bound,
    arrays: Mapping[str, Tensor],
    *,
    lead: Sequence[str] = (),
    attributes: Mapping[str, Any] | None = None,
) -> Any:
    """Arrays ``[*plates, *event]``, or ``[n, *plates, *event]`` with the axes ``lead`` in front."""
    xarray = _xarray()
    variables: dict[str, Any] = {}
    coordinates: dict[str, list[Any]] = {}
    for name, tensor in arrays.items():
        array = tensor.detach().cpu().numpy()
        array = array[None] if lead else array
        plates = plates_of(bound, name)
        shown = f"{name}_index" if name in bound.graph.plates else name
        event = [f"{shown}_dim_{i}" for i in range(array.ndim - len(lead) - len(plates))]
        dims = [*lead, *plates, *event]
        variables[shown] = (dims, array)
        coordinates |= {d: list(range(size)) for d, size in zip(dims, array.shape, strict=True)}
        coordinates |= {p: _coordinate(bound.labels[p]) for p in plates}
    return xarray.Dataset(
        variables, coordinates, {"inference_library": "factorppl", **(attributes or {})}
    )


def _coordinate(labels: Sequence[Any]) -> list[Any]:
    # A mixture of types would become an array of objects, which no file format takes.
    plain = list(labels)
    return plain if len({type(v) for v in plain}) == 1 else [str(v) for v in plain]


def _observed(bound: Bound) -> dict[str, Tensor]:
    """Observed arrays, missing entries as nan."""
    found = {}
    for variable in bound.graph.role("observed"):
        if variable.name not in bound.values:
            continue
        value, mask = bound.values[variable.name], bound.masks.get(variable.name)
        found[variable.name] = value if mask is None else torch.where(mask, value, torch.nan)
    return found


def _log_likelihood(posterior: Posterior, n: int) -> Any:
    """One number an entry; where some are missing, one dimension over those present."""
    bound = posterior.bound
    # With its default seed this takes the same joint draws as the group `posterior`.
    try:
        terms = posterior.log_likelihood(n=n)
    except (
        UnsupportedError
    ):  # an observed Markov chain has no likelihood by entry; the rest is still of use
        terms = {}
    whole = {name: values for name, values in terms.items() if name not in bound.masks}
    dataset = _dataset(bound, whole, lead=_DRAWS)
    for name in terms.keys() - whole.keys():
        # Padded with zeros, missing entries would count as observations whose weights have no tail
        # to fit.
        shape = terms[name].shape[1:]
        present = bound.masks[name].reshape(*shape, -1).any(-1).reshape(-1).cpu()
        names = [
            e
            for e, here in zip(element_names(bound, name, shape), present.tolist(), strict=True)
            if here
        ]
        array = terms[name].reshape(1, n, -1)[..., present].cpu().numpy()
        entry = f"{name}_entry"
        dataset = dataset.assign({name: ((*_DRAWS, entry), array), entry: names})
    return dataset.assign_coords(chain=[0], draw=range(n)) if terms else dataset


def _quality(posterior: Posterior) -> dict[str, Any]:
    """Attributes of ``sample_stats``: plain numbers and text, which every file format takes."""
    found = {
        "method": posterior.method,
        "seed": posterior.seed,
        "verdict": posterior.diagnostics.verdict,
        "converged": int(posterior.diagnostics.converged),
        "iterations": posterior.diagnostics.iterations,
        "sampling_time": posterior.diagnostics.seconds,
    }
    if posterior.log_evidence is not None:
        evidence = posterior.log_evidence
        found |= {
            "log_evidence": evidence.value,
            "log_evidence_se": evidence.se,
            "log_evidence_kind": evidence.kind,
        }
    return found


def _arviz() -> Any:
    try:
        import arviz
    except ImportError:
        raise UnsupportedError(
            "to_arviz needs the extra 'arviz': pip install factorppl[arviz]. posterior.samples() "
            "and "
            "posterior.log_likelihood() hold the same numbers."
        ) from None
    return arviz


def _xarray() -> Any:
    try:
        import xarray
    except ImportError:
        raise UnsupportedError(
            "to_arviz needs xarray, which the extra 'arviz' brings: pip install factorppl[arviz]."
        ) from None
    return xarray
