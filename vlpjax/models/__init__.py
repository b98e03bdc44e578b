"""Towers and their parts: pure Flax Linen modules that return every intermediate by name."""
