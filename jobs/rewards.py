"""`ray job submit --working-dir . -- python jobs/rewards.py …`: the verb `mage-ray rewards`, with its options."""

import sys

from mage_ray.cli import main

sys.exit(main(["rewards", *sys.argv[1:]]))
