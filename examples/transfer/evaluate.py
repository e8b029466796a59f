"""Scores of a checkpoint on what it was never trained on: answers that are right to the letter, and perplexity.

An answer that is decoded greedily is the expected one exactly if, after each beginning of the expected one, the
likeliest next token is the expected one's. That is read from one pass over request and answer, several times as fast as
decoding.
`agreement` decodes, to see how often the two are the same: in bf16 other shapes of batches round otherwise, and the
same text can be written in other tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from examples.transfer import corpus
from examples.transfer.batches import END, encode, logits, question, slices, whole
from examples.transfer.models import load, load_tokenizer
from examples.transfer.skills import Item, items

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

EVALUATION_SEED = 0  # the same items whatever the seed of the training
ITEMS_AT_ONCE = 50
BLOCKS_AT_ONCE = 8
LONGEST_ANSWER = 40


def evaluate(checkpoint: Path, skills: Sequence[str], count: int, blocks: int) -> dict[str, Any]:
    """Return, for each skill, how many of ``count`` answers are right, and the perplexity of the domain's text."""
    model, tokenizer = load(checkpoint, torch.bfloat16).eval(), load_tokenizer(checkpoint)
    scores: dict[str, Any] = {}
    with torch.inference_mode():
        for skill in skills:
            asked = items(skill, count, EVALUATION_SEED, held_out=True)
            right, loss = answers(model, tokenizer, asked)
            scores[skill] = {"right": sum(right), "items": count, "answer_loss": round(loss, 4)}
        text = corpus.blocks(tokenizer, blocks, EVALUATION_SEED, held_out=True)
        return {"skills": scores, "perplexity": round(perplexity(model, text), 4)}


def answers(model: Any, tokenizer: Any, asked: Sequence[Item]) -> tuple[list[bool], float]:
    """Return which answers greedy decoding would get right, and the mean loss per token of the expected ones."""
    right: list[bool] = []
    losses: list[float] = []
    for part in slices(len(asked), ITEMS_AT_ONCE):
        batch = encode(tokenizer, asked[part])
        predicted = logits(model, batch).float()
        wrong = torch.zeros(len(batch.tokens), dtype=torch.bool)
        wrong[batch.rows[predicted.argmax(-1) != batch.targets]] = True
        right += (~wrong).tolist()
        losses += torch.nn.functional.cross_entropy(predicted, batch.targets, reduction="none").tolist()
    return right, sum(losses) / len(losses)


def perplexity(model: Any, text: Any) -> float:
    """Return e to the mean loss per token."""
    losses = []
    for part in text.split(BLOCKS_AT_ONCE):
        batch = whole(part)
        losses.append(torch.nn.functional.cross_entropy(logits(model, batch).float(), batch.targets).item())
    return math.exp(sum(losses) / len(losses))


def agreement(checkpoint: Path, skills: Sequence[str], count: int) -> dict[str, Any]:
    """Decode greedily; return for how many answers that says what `answers` says, and one answer of each skill."""
    model, tokenizer = load(checkpoint, torch.bfloat16).eval(), load_tokenizer(checkpoint)
    asked = [item for skill in skills for item in items(skill, count, EVALUATION_SEED, held_out=True)]
    with torch.inference_mode():
        expected, _ = answers(model, tokenizer, asked)
        decoded = [
            text for part in slices(len(asked), ITEMS_AT_ONCE) for text in _decode(model, tokenizer, asked[part])
        ]
    right = [text == item.answer for text, item in zip(decoded, asked, strict=True)]
    same = sum(one == other for one, other in zip(right, expected, strict=True))
    shown = {item.skill: [item.prompt, item.answer, text] for item, text in zip(asked, decoded, strict=True)}
    return {"items": len(asked), "same": same, "right": sum(right), "shown": shown}


def _decode(model: Any, tokenizer: Any, asked: Sequence[Item]) -> list[str]:
    prompts = tokenizer([question(item) for item in asked], return_tensors="pt", padding=True, padding_side="left")
    end = tokenizer.convert_tokens_to_ids(END)
    tokens = model.generate(
        **prompts, max_new_tokens=LONGEST_ANSWER, do_sample=False, eos_token_id=end, pad_token_id=end
    )
    return list(tokenizer.batch_decode(tokens[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True))
