"""The comparison: every method under the same conditions, its constants chosen on prompts that aren't tested on."""
