"""Ready losses, and :class:`Loss` for one of your own."""

from blockspec.model.losses import Loss as Loss
from blockspec.model.losses import classification as classification
from blockspec.model.losses import masked_token as masked_token
from blockspec.model.losses import next_token as next_token
from blockspec.model.losses import regression as regression
