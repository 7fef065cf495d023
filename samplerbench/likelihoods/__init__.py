"""Likelihoods of data under a model: the variational bound of a chain, and the density of the probability-flow ODE."""
