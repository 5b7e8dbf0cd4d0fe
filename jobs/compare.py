"""`ray job submit --working-dir . -- python jobs/compare.py …`: the verb `mage-ray compare`, with its options."""

import sys

sys.path.pop(0)  # this folder: its names would hide a study's own modules

from mage_ray.cli import main

sys.exit(main(["compare", *sys.argv[1:]]))
