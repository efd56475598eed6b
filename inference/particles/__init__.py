"""Particles of blocks of latents, weighed in all combinations by tensor contraction; shared by qem, vi and rws.

Source: [Heap2025], [Bowyer2023].
"""

from ppl.inference.particles.forms import (
    LinearGaussian,
    Mirrored,
    Prior,
    Sites,
    Skewed,
    Table,
    Tied,
    Tilted,
)

__all__ = ["LinearGaussian", "Mirrored", "Prior", "Sites", "Skewed", "Table", "Tied", "Tilted"]
