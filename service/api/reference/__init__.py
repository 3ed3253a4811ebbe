"""The API described: OpenAPI and the page for readers."""
