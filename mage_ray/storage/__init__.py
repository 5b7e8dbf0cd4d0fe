"""Files at a URL that all nodes reach, and a node's copy of them."""
