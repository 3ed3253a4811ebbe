"""The console script: its command line, and the operator's commands for the store."""
