"""Everything that uses the internals of hypercorn and Quart-Trio; each workaround has its removal test."""
