"""What the commands need of a terminal: output, widths, keys and a line to type in."""
