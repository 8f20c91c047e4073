"""Which products next, until every block is accurate enough."""
