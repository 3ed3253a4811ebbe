"""Metrics: what is counted and measured, where the numbers are kept, and the text that Prometheus reads."""
