"""``python -m blockspec`` is the command ``blockspec``."""

from blockspec.runs.cli import main

main()
