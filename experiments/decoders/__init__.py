"""Decoders: language models that learn from text alone, for their own sake and as parts of larger systems."""
