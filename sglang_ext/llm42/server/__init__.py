"""LLM-42 in the process that clients talk to: marks of requests, reports in ``meta_info``, endpoints."""
