"""Experiments that compare images with texts."""
