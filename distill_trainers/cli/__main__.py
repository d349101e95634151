"""`python -m distill_trainers.cli COMMAND …`."""

import sys

from . import main

sys.exit(main())
