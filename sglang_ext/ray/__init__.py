"""The same server on a Ray cluster: one node or many, started by one command (docs/ray.md)."""
