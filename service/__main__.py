"""``python -m service`` is the console script ``lastcall``."""

import sys

from service.cli.main import main

sys.exit(main())
