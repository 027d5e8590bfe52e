"""LLM-42: deterministic output on request, by decode, verify and roll back."""
