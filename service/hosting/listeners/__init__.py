"""The listening sockets: how they are served and closed, and the status that workers show each other."""
