"""What the commands need of a terminal: output, widths, keys and a line to type in.

``rich`` is not used: six styles, the width of a text and a line that is typed are little code, and it would bring four
packages into the image of each server.
"""
