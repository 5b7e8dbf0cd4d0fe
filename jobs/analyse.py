"""`ray job submit --working-dir . -- python jobs/analyse.py …`: the verb `mage-ray analyse`, with its options."""

import sys

sys.path.pop(0)  # this folder: its names would hide a study's own modules

from mage_ray.cli import main

sys.exit(main(["analyse", *sys.argv[1:]]))
