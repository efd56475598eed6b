"""Networks for methods with a Gaussian over every weight: what ``vi`` and ``ssvi`` share.

A model with layers is lowered once to a plain function of a batch in which every product of a layer is a callable given
at run time (:mod:`program`), so that an estimator decides how a layer is evaluated (:mod:`estimators`) and a product how
its array of weights is stored (:mod:`products`). :mod:`structure` sorts the latents, :mod:`priors` has the KL terms,
:mod:`fit` one stochastic gradient step on a flat state, :mod:`results` the posterior, :mod:`costs` what it costs.
"""
