"""`ray job submit --working-dir . -- python jobs/export.py …`: the verb `mage-ray export`, with its options."""

import sys

from mage_ray.cli import main

sys.exit(main(["export", *sys.argv[1:]]))
