"""Experiments about optimizers."""
