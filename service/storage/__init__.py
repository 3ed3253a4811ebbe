"""Stores: where sessions and turns are kept. Written on AnyIO."""
