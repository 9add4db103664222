"""moescope: watch a Mixture-of-Experts language model route, token by token."""

__version__ = "0.1.0"
