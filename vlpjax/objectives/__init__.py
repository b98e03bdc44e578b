"""Objectives: pure functions from the features of towers to losses."""
