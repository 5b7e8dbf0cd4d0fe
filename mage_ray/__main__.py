"""``python -m mage_ray`` is the command line ``mage-ray``."""

import sys

from mage_ray.cli import main

sys.exit(main())
