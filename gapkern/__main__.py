"""`python -m gapkern`."""

import sys

from gapkern.cli import main

sys.exit(main())
