"""Benchmarks: a deploy while N people stream, on this service and on the usual other servers.

``python -m bench --help`` shows the options; README.md beside this file describes the measurements.
"""
