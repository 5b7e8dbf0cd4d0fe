"""`ray job submit --working-dir . -- python jobs/evaluate.py …`: the verb `mage-ray evaluate`, with its options."""

import sys

sys.path.pop(0)  # this folder: its names would hide a study's own modules

from mage_ray.cli import main

sys.exit(main(["evaluate", *sys.argv[1:]]))
