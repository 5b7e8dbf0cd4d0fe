"""`ray job submit --working-dir . -- python jobs/export.py …`: the verb `mage-ray export`, with its options."""

import sys

sys.path.pop(0)  # this folder: its names would hide a study's own modules

from mage_ray.cli import main

sys.exit(main(["export", *sys.argv[1:]]))
