"""The HTTP service on Ray Serve: one trained study, whose every request picks its own trade-off."""
