"""A run: its folder, the command line, the report."""
