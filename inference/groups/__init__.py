"""A model as groups of linearised factor rows, the common ground of Gaussian message passing and least squares."""

from ppl.inference.groups.build import build
from ppl.inference.groups.learning import learn
from ppl.inference.groups.linearise import energies, linearise, output_jacobian
from ppl.inference.groups.losses import LogDensity, Loss, Quadratic, Robust
from ppl.inference.groups.records import FactorGroups, Family, Group, Linearised, Slot
from ppl.inference.groups.support import refuse_settings, unsupported

__all__ = [
    "FactorGroups",
    "Family",
    "Group",
    "Linearised",
    "LogDensity",
    "Loss",
    "Quadratic",
    "Robust",
    "Slot",
    "build",
    "energies",
    "learn",
    "linearise",
    "output_jacobian",
    "refuse_settings",
    "unsupported",
]
