"""Ready losses, and :class:`Loss` for one of your own."""

from blockspec.model.losses import Loss as Loss
from blockspec.model.losses import classification as classification
from blockspec.model.losses import masked_token as masked_token
from blockspec.model.losses import next_token as next_token
from blockspec.model.losses import regression as regression
from blockspec.model.task_losses import contrastive as contrastive
from blockspec.model.task_losses import ctc as ctc
from blockspec.model.task_losses import model_loss as model_loss
from blockspec.model.task_losses import multi_label as multi_label
from blockspec.model.task_losses import question_answering as question_answering
from blockspec.model.task_losses import segmentation as segmentation
from blockspec.model.task_losses import sequence_to_sequence as sequence_to_sequence
from blockspec.model.task_losses import sigmoid_contrastive as sigmoid_contrastive
