"""Text as tensors: rows of one length, and the places in them where a next token is to be predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from examples.transfer.skills import Item

# What requests and answers need. Every batch has the same shape: the processor's kernels are prepared for each anew.
ROW = 56
END = "<|im_end|>"


@dataclass(frozen=True)
class Batch:
    """Rows of tokens. ``places`` counts through all rows; the token to predict there is the next one in the row."""

    tokens: Any
    places: Any
    targets: Any
    rows: Any


def encode(tokenizer: Any, items: Sequence[Item]) -> Batch:
    """Return requests and answers as turns of a conversation; only the answers are to be predicted, their end too.

    Rows are filled up behind the answer, where causal attention does not look: no mask is needed.
    """
    tokens = torch.full((len(items), ROW), tokenizer.convert_tokens_to_ids(END))
    places, rows = [], []
    for row, item in enumerate(items):
        asked = tokenizer(question(item))["input_ids"]
        answer = tokenizer(item.answer + END)["input_ids"]
        if len(asked) + len(answer) > ROW:
            raise ValueError(f"{len(asked) + len(answer)} tokens do not fit into {ROW}: {item.prompt!r}")
        tokens[row, : len(asked) + len(answer)] = torch.tensor(asked + answer)
        places += [row * ROW + len(asked) - 1 + k for k in range(len(answer))]
        rows += [row] * len(answer)
    found = torch.tensor(places)
    return Batch(tokens, found, tokens.flatten()[found + 1], torch.tensor(rows))


def question(item: Item) -> str:
    """Return a request as the model is asked it."""
    return f"<|im_start|>user\n{item.prompt}{END}\n<|im_start|>assistant\n"


def whole(tokens: Any) -> Batch:
    """Return rows of running text, all of which but the first tokens is to be predicted."""
    count, length = tokens.shape
    places = torch.arange(count * length).view(count, length)[:, :-1].flatten()
    return Batch(tokens, places, tokens.flatten()[places + 1], places // length)


def slices(count: int, size: int) -> Iterator[slice]:
    """Cut a number of things into batches."""
    for start in range(0, count, size):
        yield slice(start, start + size)


def logits(model: Any, batch: Batch) -> Any:
    """Return what the model predicts, at the places alone: the head is a fifth of this model."""
    hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
    return model.lm_head(hidden.flatten(0, 1)[batch.places])
