"""`ray job submit --working-dir . -- python jobs/search.py …`: the verb `mage-ray search`, with its options."""

import sys

sys.path.pop(0)  # this folder: its names would hide a study's own modules

from mage_ray.cli import main

sys.exit(main(["search", *sys.argv[1:]]))
