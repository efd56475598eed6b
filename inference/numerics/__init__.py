"""Numerics that backends share: special functions, linear algebra, exponential families."""
