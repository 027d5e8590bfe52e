"""What operators see of LLM-42: Prometheus metrics and the commit log of finished requests."""
