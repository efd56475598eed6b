"""Models to start from, each with the data it is made for."""

if __name__ != "ppl.models":  # a second copy of every model would come of it
    raise ImportError("this folder is imported as ppl.models: write 'import ppl.models'")

from ppl.models import datasets
from ppl.models.hierarchical import eight_schools, radon, radon_states, rats
from ppl.models.ratings import movielens

__all__ = ["datasets", "eight_schools", "movielens", "radon", "radon_states", "rats"]
