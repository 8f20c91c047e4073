"""``python -m blockspec`` is the command ``blockspec``."""

from .cli import main

main()
