"""Input: sources, transforms, tokenizers, and the step-addressed pipeline that feeds the mesh."""
