"""When merging and guiding work: measurements on a trained study (METHOD.md sections 2, 3 and 5)."""

ANALYSES = ("connectivity", "merging", "compatibility", "sensitivity")
"""Their names, in the order of the page."""
