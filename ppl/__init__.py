"""A probabilistic programming language on PyTorch: one model, many methods of inference."""

# First of all, so that every later import of `ppl.inference` works in a source checkout too.
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

from ppl import _checkout

_checkout.install(_Path(__file__).resolve().parent)

from ppl import distributions, metrics, nn
from ppl.backend import register
from ppl.distributions import *  # noqa: F403 - families are words of the language
from ppl.driver import Stop, explain, infer
from ppl.errors import DataError, ModelError, NumericalError, PPLError, UnsupportedError
from ppl.manifolds import SE2, SE3, SO2, SO3
from ppl.model import Model, model
from ppl.plates import dot, logsumexp, mean, pick, plate, shift, sum  # noqa: A004 - words of the language
from ppl.posterior import Evidence, Posterior
from ppl.sites import deterministic, factor, given, latent, observe, param, scope

if TYPE_CHECKING:
    from ppl.inference.exact import Exact as Exact
    from ppl.inference.qem import QEM as QEM
    from ppl.inference.rws import RWS as RWS
    from ppl.inference.vi import VI as VI
    from ppl.save import load as load

__version__ = "0.1.0"

# Imported on first use: the language reaches a backend, and its options record, by name only.
_ON_USE = {
    "AMP": "ppl.inference.amp",
    "GBP": "ppl.inference.gbp",
    "QEM": "ppl.inference.qem",
    "RWS": "ppl.inference.rws",
    "VI": "ppl.inference.vi",
    "Exact": "ppl.inference.exact",
    "LaplaceApproximation": "ppl.inference.laplace",
    "load": "ppl.save",
    "state_evolution": "ppl.inference.amp",
}


def __getattr__(name: str) -> Any:
    if name in _ON_USE:
        import importlib

        return getattr(importlib.import_module(_ON_USE[name]), name)
    raise AttributeError(f"module 'ppl' has no attribute {name!r}")


__all__ = [
    *distributions.__all__,
    "SE2",
    "SE3",
    "SO2",
    "SO3",
    "DataError",
    "Evidence",
    "Model",
    "ModelError",
    "NumericalError",
    "PPLError",
    "Posterior",
    "Stop",
    "UnsupportedError",
    "__version__",
    "deterministic",
    "distributions",
    "dot",
    "explain",
    "factor",
    "given",
    "infer",
    "latent",
    "logsumexp",
    "mean",
    "metrics",
    "model",
    "nn",
    "observe",
    "param",
    "pick",
    "plate",
    "register",
    "scope",
    "shift",
    "sum",
]
