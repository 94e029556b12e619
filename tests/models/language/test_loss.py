"""Packed documents weigh as much as alone: the loss and its gradients, against a loop over documents."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.language.loss import (
    Goal,
    documents,
    shifted,
    summed,
    summed_in_chunks,
    token_weights,
    with_padding,
)

LENGTHS = [5, 2, 9]  # and 4 of padding
WIDTH, VOCABULARY = 8, 13


def packed():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCABULARY, (20,), generator=generator)
    learnt = torch.rand(20, generator=generator) < 0.6
    learnt[5:7] = False  # the second document teaches nothing
    learnt[-4:] = True  # nor does padding, whatever the mask says of it
    return tokens, learnt


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCABULARY))


def gradients(loss, model) -> list[torch.Tensor]:
    return torch.autograd.grad(loss, list(model.parameters()))


def of_each_alone(model, tokens, learnt):
    """Mean over the documents that teach something of the mean over their supervised targets."""
    losses, start = [], 0
    for length in LENGTHS:
        own, marks = tokens[start : start + length], learnt[start + 1 : start + length]
        start += length
        if marks.any():
            losses.append(F.cross_entropy(model(own[:-1])[marks], own[1:][marks]))
    return torch.stack(losses).mean()


def test_packed_loss_and_gradients_equal_the_mean_of_the_documents():
    (tokens, learnt), model = packed(), network()
    supervised = shifted(learnt, LENGTHS)
    total = summed(model(tokens), shifted(tokens, LENGTHS), token_weights(LENGTHS, supervised))
    loss, alone = total / documents(LENGTHS, supervised), of_each_alone(model, tokens, learnt)
    torch.testing.assert_close(loss, alone)
    for a, b in zip(gradients(loss, model), gradients(alone, model), strict=True):
        torch.testing.assert_close(a, b)


def test_a_mean_over_tokens_is_another_number():
    (tokens, learnt), model = packed(), network()
    marks = shifted(learnt, LENGTHS)
    of_tokens = F.cross_entropy(model(tokens)[marks], shifted(tokens, LENGTHS)[marks])
    assert (of_tokens - of_each_alone(model, tokens, learnt)).abs().item() > 0.01


def test_the_loss_does_not_depend_on_how_documents_are_packed():
    """One row of all, or two rows: the sums and counts add up to the same."""
    (tokens, learnt), model = packed(), network()
    one = summed(model(tokens), shifted(tokens, LENGTHS), token_weights(LENGTHS, shifted(learnt, LENGTHS)))
    rows = torch.zeros(2, 11, dtype=torch.long), torch.zeros(2, 11, dtype=torch.bool)
    for row, x in zip(rows, (tokens, learnt), strict=True):
        row[0, :7], row[1, :9] = x[:7], x[7:16]
    lengths = [[5, 2], [9]]
    marks = shifted(rows[1], lengths)
    two = summed(model(rows[0]), shifted(rows[0], lengths), token_weights(lengths, marks))
    torch.testing.assert_close(one, two)
    assert documents(lengths, marks) == documents(LENGTHS, shifted(learnt, LENGTHS)) == 2


def test_weights_of_a_document_sum_to_one_and_of_padding_to_none():
    _, learnt = packed()
    weights = token_weights(LENGTHS, learnt)
    sums = [float(part.sum()) for part in weights.split([*LENGTHS, 4])]
    assert sums == pytest.approx([1, 0, 1, 0])


def test_no_target_is_of_the_next_document():
    x = torch.arange(1, 21)
    expected = [2, 3, 4, 5, 0, 7, 0, 9, 10, 11, 12, 13, 14, 15, 16, 0, 0, 0, 0, 0]
    assert shifted(x, LENGTHS).tolist() == expected
    assert x.tolist() == list(range(1, 21))


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunks_change_neither_the_loss_nor_the_gradients(chunk: int):
    (tokens, learnt), model = packed(), network()
    targets, weights = shifted(tokens, LENGTHS), token_weights(LENGTHS, shifted(learnt, LENGTHS))
    body, head = model[:2], model[2]
    whole = summed(model(tokens), targets, weights)
    chunked = summed_in_chunks(head, body(tokens)[None], Goal.of(targets, weights), chunk)
    torch.testing.assert_close(whole, chunked)
    for a, b in zip(gradients(whole, model), gradients(chunked, model), strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_that_teaches_nothing_has_loss_and_gradients_of_zero():
    model, tokens = network(), torch.arange(6)
    goal = Goal.of(tokens, torch.zeros(6))
    loss = summed_in_chunks(model[2], model[:2](tokens)[None], goal)
    assert loss.item() == 0
    assert all(not g.any() for g in gradients(loss, model))


def test_lengths_that_do_not_fit_are_refused_in_words():
    with pytest.raises(ValueError, match="do not fit a sequence of 4"):
        with_padding([3, 2], 4)
    with pytest.raises(ValueError, match="a list for each"):
        token_weights([3, 2], torch.ones(2, 5, dtype=torch.bool))
