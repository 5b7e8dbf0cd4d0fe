"""When merging and guiding work: measurements on a trained study (docs/method.md)."""

ANALYSES = ("connectivity", "merging", "compatibility", "sensitivity")
"""Their names, in the order of the page."""
