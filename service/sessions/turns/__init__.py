"""One turn: its state, its task and the prompt it sends."""
