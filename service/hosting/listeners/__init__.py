"""The listening sockets: bound, served, closed, and what workers tell each other of it."""
