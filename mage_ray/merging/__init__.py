"""From a preference to weights: coefficients, the stacked experts, their per-row mix, and exact export."""
