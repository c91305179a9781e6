"""The loss: next-token cross entropy in float32.

Shapes: B rows of a batch, S tokens, V vocabulary.
"""

from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a label that is not trained on: the prompt and the padding


def next_token_loss(
    logits_BSV: Tensor, labels_BS: Tensor, num_items: Tensor | int | None = None
) -> Tensor:
    """Mean cross entropy of each token's logits against the label one place further on.

    Args:
        logits_BSV: any float type; the loss is taken in float32.
        labels_BS: not shifted; `IGNORED` where nothing is to be learned.
        num_items: what the summed loss is divided by, for batches that are one part of a larger
            step; the number of labels in this batch by default.

    Returns:
        A float32 scalar; 0 when a batch holds no label at all.
    """
    targets = labels_BS[:, 1:].flatten()
    logits = logits_BSV[:, :-1].flatten(0, 1).float()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    count = (targets != IGNORED).sum().clamp(min=1) if num_items is None else num_items
    return total / count
