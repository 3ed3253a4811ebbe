"""What operators and their machines ask: health and readiness."""
