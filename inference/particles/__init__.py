"""Particles of blocks of latents, weighed in all combinations by tensor contraction; shared by qem, vi and rws.

Source: [Heap2025], [Bowyer2023].
"""

from ppl.inference.particles.forms import LinearGaussian, Prior, Table, Tied, Tilted

__all__ = ["LinearGaussian", "Prior", "Table", "Tied", "Tilted"]
