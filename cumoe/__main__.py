"""``python -m cumoe``: the command line."""

import sys

from cumoe.cli import main

sys.exit(main())
