"""Approximate message passing: sparse and generalised linear models with one large linear map."""

from ppl.inference.amp.forecast import Forecast, state_evolution
from ppl.inference.amp.options import AMP
from ppl.inference.amp.problem import describe, prepare
from ppl.inference.amp.recognise import supports
from ppl.inference.amp.results import AMPPosterior, posterior
from ppl.inference.amp.sweep import init, step

Options = AMP
looks_inside = True
takes_sparse = True

__all__ = [
    "AMP",
    "AMPPosterior",
    "Forecast",
    "Options",
    "describe",
    "init",
    "looks_inside",
    "posterior",
    "prepare",
    "state_evolution",
    "step",
    "supports",
    "takes_sparse",
]
