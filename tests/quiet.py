"""Short fits by qem: what they warn of, such as too few iterations, is not what the test is about."""

from __future__ import annotations

import warnings

from ppl import infer


def quiet_fit(*args, **options):
    """``infer`` with ``method="qem"`` and a seed, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return infer(*args, **{"method": "qem", "seed": 0, **options})
