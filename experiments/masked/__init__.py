"""Masked and predictive pretraining: systems that learn from images alone by filling in what was hidden."""
