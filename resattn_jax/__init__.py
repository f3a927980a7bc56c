"""Residual Attention Networks (Wang et al., CVPR 2017) in JAX and Flax."""

__version__ = "0.1.0"
