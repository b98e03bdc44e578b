"""vlpjax: large-scale vision-language pretraining in JAX and Flax, for TPU and GPU pods."""

__version__ = "0.1.0"
