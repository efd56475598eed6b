"""Houses in counties, ragged: the small hierarchy that several tests of proposals enumerate."""

from __future__ import annotations

from ppl import Normal, latent, model, observe, plate


@model
def hierarchy():
    """Two levels; houses are ragged over counties."""
    county = plate("county")
    house = plate("house", within=county)
    mean = latent("mean", Normal(0.0, 1.0))
    with county:
        level = latent("level", Normal(mean, 0.7))
    with house:
        effect = latent("effect", Normal(level, 0.5))
        observe("y", Normal(effect, 1.0))


COUNTY = [0, 1, 1, 2, 2]
RAGGED = {"county": COUNTY, "y": [0.3, 1.2, 0.7, -0.4, 2.0]}
