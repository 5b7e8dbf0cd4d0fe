"""`ray job submit --working-dir . -- python jobs/train.py …`: the verb `mage-ray train`, with its options."""

import sys

from mage_ray.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
