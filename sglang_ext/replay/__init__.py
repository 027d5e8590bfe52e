"""``python -m sglang_ext.replay``: run logged deterministic requests again and compare."""
