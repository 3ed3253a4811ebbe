"""Benchmarks: what happens on a deploy with N people streaming, here and with what one would have written otherwise.

``python -m bench --help`` tells how to run it; README.md beside this file says what is measured and how.
"""
