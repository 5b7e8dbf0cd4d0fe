"""Rows, plans, the runner and the engine: guided decoding over one set of weights."""
