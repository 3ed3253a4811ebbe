"""The HTTP API: translates between requests and the registry of sessions, and decides nothing itself."""
