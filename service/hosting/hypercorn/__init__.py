"""All that replaces or patches hypercorn; each workaround has its removal test."""
