"""The loss against its definition."""

import torch

from glmtune.ops.loss import next_token_loss


def test_mean_over_the_labels_one_place_further_on():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 4, 7), torch.tensor([[-100, 1, 2, -100], [3, -100, -100, 6]])
    log_p = logits.log_softmax(-1)
    picked = torch.stack([log_p[0, 0, 1], log_p[0, 1, 2], log_p[1, 2, 6]])
    torch.testing.assert_close(next_token_loss(logits, labels), -picked.mean())
    torch.testing.assert_close(next_token_loss(logits, labels, 10), -picked.sum() / 10)


def test_a_batch_without_labels_costs_nothing():
    assert next_token_loss(torch.randn(1, 3, 5), torch.full((1, 3), -100)) == 0
