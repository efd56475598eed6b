"""Models to start from, each with the data it is made for."""

if __name__ != "ppl.models":  # a second copy of every model would come of it
    raise ImportError("this folder is imported as ppl.models: write 'import ppl.models'")

from ppl.models import datasets, pose_graphs, transforms, worlds
from ppl.models.bnn import classifier, regression
from ppl.models.epidemics import covid
from ppl.models.grids import denoise, denoise_pairs, gaussian_grid, stereo
from ppl.models.hierarchical import eight_schools, radon, radon_counties, radon_states, rats
from ppl.models.logistic import bus_breakdown, chimpanzees
from ppl.models.mixture import mixture, ordered_mixture, zero_inflated
from ppl.models.occupancy import occupancy
from ppl.models.ratings import movielens
from ppl.models.slam import bundle_adjustment, pose_graph_2d, pose_graph_3d
from ppl.models.sparse import (
    chain_sparse,
    group_sparse,
    nonnegative_sparse,
    one_bit,
    sensed_image,
    sparse_binary,
    sparse_counts,
    sparse_linear,
    sparse_spectrum,
)
from ppl.models.timeseries import (
    autoregression,
    local_level,
    local_linear_trend,
    stochastic_volatility,
    tracking,
)

__all__ = [
    "autoregression",
    "bundle_adjustment",
    "bus_breakdown",
    "chain_sparse",
    "chimpanzees",
    "classifier",
    "covid",
    "datasets",
    "denoise",
    "denoise_pairs",
    "eight_schools",
    "gaussian_grid",
    "group_sparse",
    "local_level",
    "local_linear_trend",
    "mixture",
    "movielens",
    "nonnegative_sparse",
    "occupancy",
    "one_bit",
    "ordered_mixture",
    "pose_graph_2d",
    "pose_graph_3d",
    "pose_graphs",
    "radon",
    "radon_counties",
    "radon_states",
    "rats",
    "regression",
    "sensed_image",
    "sparse_binary",
    "sparse_counts",
    "sparse_linear",
    "sparse_spectrum",
    "stereo",
    "stochastic_volatility",
    "tracking",
    "transforms",
    "worlds",
    "zero_inflated",
]
