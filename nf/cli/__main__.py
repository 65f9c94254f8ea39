"""``python -m nf.cli`` is ``nf``."""

import sys

from nf.cli.main import main

sys.exit(main())
