"""Optimizers as optax factories, schedules, and what is said per parameter."""
