"""`python -m inkwell` is the `inkwell` command."""

import sys

from inkwell.cli import main

sys.exit(main())
