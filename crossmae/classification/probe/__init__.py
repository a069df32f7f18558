"""Probes: evaluate frozen features by nearest neighbours, linear layers and logistic regression."""
