"""The end of the process: its exit codes, and the watchdog that sees to it."""
