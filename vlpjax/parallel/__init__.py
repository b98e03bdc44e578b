"""Attention and losses over shards of a mesh; knows no model."""
