"""Operators: (block, vector) -> H_bb v."""
