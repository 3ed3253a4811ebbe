"""Calls for operators and their tools: health and readiness."""
