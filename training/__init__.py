"""What language and vision models share: a small trainer that knows nothing of the model's kind,
and the way to the hub.
"""
