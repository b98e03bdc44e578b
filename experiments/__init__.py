"""Experiments: one file each, named on the command line and imported by nobody else."""
