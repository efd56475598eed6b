"""Particles of blocks of latents, weighed in all combinations by tensor contraction; shared by qem, vi and rws.

Source: [Heap2025], [Bowyer2023].
"""
