"""`ray job submit --working-dir . -- python jobs/generate.py …`: the verb `mage-ray generate`, with its options."""

import sys

sys.path.pop(0)  # this folder: its names would hide a study's own modules

from mage_ray.cli import main

sys.exit(main(["generate", *sys.argv[1:]]))
