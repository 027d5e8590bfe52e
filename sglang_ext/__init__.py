"""Deterministic-on-request inference and compute/communication overlap for stock SGLang."""

__version__ = "0.1.0"
