"""Searches over settings: what proposes the next ones to try, and what keeps count."""
