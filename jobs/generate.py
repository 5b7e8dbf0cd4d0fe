"""`ray job submit --working-dir . -- python jobs/generate.py …`: the verb `mage-ray generate`, with its options."""

import sys

from mage_ray.cli import main

sys.exit(main(["generate", *sys.argv[1:]]))
