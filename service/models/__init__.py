"""Model clients: adapters to the servers that produce tokens. Written on AnyIO."""
