"""Evaluators: what a trained model can do, measured over the mesh."""
