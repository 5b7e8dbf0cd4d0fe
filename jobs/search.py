"""`ray job submit --working-dir . -- python jobs/search.py …`: the verb `mage-ray search`, with its options."""

import sys

from mage_ray.cli import main

sys.exit(main(["search", *sys.argv[1:]]))
