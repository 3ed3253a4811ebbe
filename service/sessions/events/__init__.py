"""A turn's events, the log that keeps them and the streams that read it."""
