"""The loops that keep the service in order: expiry, heartbeats, recovery, checkpoints."""
