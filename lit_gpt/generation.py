"""Sampling from a model: prefill in segments, then token by token at constant memory; and the text as it comes.

    for token in generate(model, prompt_ids, max_new_tokens=256, temperature=0.8, top_k=50):
        print(stream.push(token), end="")

The model keeps its past in a cache whose size does not grow: states, convolution inputs and a window of keys and values
(full attention, all of them, in room made at the start).
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Optional, Union

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet


def generate(
    model: GPT,
    prompt_ids: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: Optional[int] = None,
    top_p: float = 1.0,
    generator: Optional[torch.Generator] = None,
    stop_ids: Sequence[int] = (),
    vocab_size: Optional[int] = None,
    prefill_chunk: int = 2048,
    cache: Optional[list] = None,
) -> Iterator[Union[int, list[int]]]:
    """Continue a prompt: the new tokens one at a time, as ints, or as lists of B ints for prompts of equal length.

    Ends after max_new_tokens, or with the first of stop_ids, which is the last token given. A row of a batch that has
    met one repeats it until all rows have. Call it under torch.autocast to compute in 16 bits.

    Args:
        prompt_ids: [T] or [B, T], T >= 1.
        temperature, top_k, top_p, generator: as in `sample`.
        vocab_size: ids from here on are never sampled: the tokenizer's size, if the embedding has more rows.
        prefill_chunk: tokens of the prompt that go through the model at a time, a multiple of 64.
        cache: from `new_cache`, with what comes before the prompt; None: a new one. It takes in all but the last token.

    Raises:
        UserError: an empty prompt, ids beyond the vocabulary, options out of range; later, logits that are not finite.
    """
    if prompt_ids.ndim not in (1, 2) or prompt_ids.numel() == 0:
        raise UserError(f"the prompt holds no tokens (shape {list(prompt_ids.shape)}); give at least one.")
    largest, smallest = int(prompt_ids.max()), int(prompt_ids.min())
    if smallest < 0 or largest >= model.config.vocab_size:
        wrong = smallest if smallest < 0 else largest
        last = model.config.vocab_size - 1
        raise UserError(f"the prompt has token id {wrong}, the model 0 to {last}. Use the tokenizer of its training.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}.")
    if prefill_chunk < 64 or prefill_chunk % 64:
        raise UserError(f"prefill_chunk must be a multiple of 64, not {prefill_chunk}.")
    check_sampling(temperature, top_k, top_p)
    ids = prompt_ids.to(model.lm_head.weight.device)
    batch = ids if ids.ndim == 2 else ids[None]
    if cache is None:
        cache = new_cache(model, len(batch), batch.shape[1] + max_new_tokens)
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
    tokens = _generate(model, batch, max_new_tokens, draw, stop_ids, vocab_size, prefill_chunk, cache)
    return tokens if ids.ndim == 2 else (row[0] for row in tokens)


@torch.inference_mode()
def _generate(
    model: GPT,
    ids: Tensor,
    max_new_tokens: int,
    draw: Callable[[Tensor], Tensor],
    stop_ids: Sequence[int],
    vocab_size: Optional[int],
    prefill_chunk: int,
    cache: list,
) -> Iterator[list[int]]:
    for segment in ids.split(prefill_chunk, dim=1):
        logits = model(segment, cache=cache, last_only=True)
    stopped: list[Optional[int]] = [None] * len(ids)
    for n in range(max_new_tokens):
        if n:
            logits = model(ids, cache=cache, last_only=True)
        sampled = draw(logits[:, -1, :vocab_size])
        row = [token if stop is None else stop for token, stop in zip(sampled.tolist(), stopped)]
        stopped = [token if token in stop_ids else None for token in row]
        yield row
        if None not in stopped:
            return
        ids = sampled[:, None]


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: Optional[int] = None,
    top_p: float = 1.0,
    generator: Optional[torch.Generator] = None,
) -> Tensor:
    """Draw one id from each row of logits, [V] -> [] or [B, V] -> [B].

    Args:
        temperature: divides the logits; 0 takes the likeliest id.
        top_k: only the k likeliest ids; None or 0: all.
        top_p: of those, only the likeliest whose probabilities first add up to top_p (arXiv 1904.09751); 1: all.
        generator: on the device of the logits; None: torch's global one.

    Raises:
        UserError: options out of range; logits that are not finite.
    """
    check_sampling(temperature, top_k, top_p)
    if not logits.amax(-1).isfinite().all():
        raise UserError("the model's logits are not finite: its training diverged. Use an earlier checkpoint.")
    if temperature == 0:
        return logits.argmax(-1)
    vocab_size = logits.shape[-1]
    logits, ids = logits.to(torch.promote_types(logits.dtype, torch.float32)).topk(min(top_k or vocab_size, vocab_size))
    # From the largest logit down, so that a temperature near 0 overflows to -inf and never to inf - inf.
    probabilities = torch.softmax((logits - logits[..., :1]) / temperature, dim=-1)
    if top_p < 1:
        likelier = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(likelier >= top_p, 0)
    choice = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(-1, choice)[..., 0]


def check_sampling(temperature: float, top_k: Optional[int], top_p: float) -> None:
    """Raise UserError for an option of `sample` that is out of range."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 (the likeliest token) or more, not {temperature}.")
    if top_k is not None and top_k < 0:
        raise UserError(f"top_k must be 1 or more, or 0 for all tokens, not {top_k}.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, not {top_p}.")


def new_cache(model: GPT, batch_size: int, max_length: int) -> list:
    """An empty cache in the dtype that the model computes in here: autocast's where it is on, else the weights'."""
    device = model.lm_head.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return model.new_cache(batch_size, max_length, dtype)


def cache_bytes(cache: list) -> int:
    """Memory that a cache holds."""
    tensors = [x for layer in cache for x in vars(layer).values() if isinstance(x, Tensor)]
    return sum(x.untyped_storage().nbytes() for x in tensors)


class TextStream:
    """The text of tokens that come one by one, given out as soon as it is final.

    A token need not be whole characters: bytes of one are held back until it is complete. Nor does it know whether its
    leading space counts, so it is decoded with the tokens before it. What may begin a stop string is held back too.

    Attributes:
        stopped: a stop string has come; it and what follows it are not given out.

    Raises:
        UserError: an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = (), stop: Sequence[str] = ()):
        if "" in stop:
            raise UserError("a stop string is empty; it would stop before the first token. Leave it out.")
        self.tokenizer, self.stop, self.stopped = tokenizer, stop, False
        self._before, self._new = list(before), []  # tokens whose text was given out last, and those since
        self._held = ""

    def push(self, token: int) -> str:
        """Take in the next token; return the text that has become final."""
        self._new.append(token)
        text = self._text_of_new()
        return "" if text.endswith(REPLACEMENT) else self._give(text)

    def flush(self) -> str:
        """What is still held back when no more tokens come."""
        text = self._give(self._text_of_new()) + self._held
        self._held = ""
        return text

    def _text_of_new(self) -> str:
        before = self.tokenizer.decode(self._before)
        return self.tokenizer.decode(self._before + self._new)[len(before) :]

    def _give(self, text: str) -> str:
        """What was held and the text of the new tokens, short of a stop string or what may become one."""
        blank = not text.strip()  # a decoder may drop blanks that come first, so they do not do as what comes before
        self._before = self._before + self._new if blank else self._new
        self._new = []
        text, self._held = self._held + text, ""
        if self.stopped:
            return ""
        found = [at for at in (text.find(s) for s in self.stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        final = len(text) - max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[final:]
        return text[:final]
