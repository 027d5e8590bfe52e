"""TokenWeave: compute/communication overlap for tensor-parallel workers (see docs/tokenweave.md)."""
