"""The service's log and its banner."""
