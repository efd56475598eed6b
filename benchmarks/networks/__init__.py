"""Bayesian networks beside plain ones: time of a step, tables of regression, and images."""
