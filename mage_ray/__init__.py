"""Controllable multi-objective generation: merged LoRA experts and guided decoding, chosen per request."""

__version__ = "0.1.0"
