"""The console script: its command line, and what an operator does with the store."""
