"""Everything that touches the insides of hypercorn and Quart-Trio; each workaround has its removal test."""
