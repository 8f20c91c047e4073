"""A small trainer that knows nothing of the model's kind. Shared by ``language_models`` and ``vision_models``."""
