"""The loops that keep the service in order: expiry, checkpoints, recovery."""
