"""Continue a prompt with a trained model, at constant memory.

    python generate.py --checkpoint runs/outputs/tsz128x4k_100B_demo --prompt "Once upon a time"

- The text goes to standard output as it comes; what is said about it goes to standard error.
- Generation ends at the token that ends a document, at a stop string, or after --max_new_tokens.
- The same seed gives the same text; sample i of several is drawn with seed + i.
"""

import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import torch
from rich.console import Console
from torch import nn

from lit_gpt.command_line import parse
from lit_gpt.config import ModelConfig
from lit_gpt.errors import UserError, exit_on_user_error
from lit_gpt.generation import TextStream, cache_bytes, check_sampling, generate, new_cache
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer
from lit_gpt.training.weights import Weights


@dataclass
class GenerateArgs:
    """What to continue, with which model, and how to sample."""

    checkpoint: Path
    """A run folder, whose newest checkpoint is taken, one of its checkpoints/step-* folders, or a safetensors file of
    scripts/convert_checkpoint.py.
    """
    prompt: str = ""
    """Text to continue; empty: begin a document, if documents begin with a token of their own."""
    prompt_file: Optional[Path] = None
    """UTF-8 file to read the prompt from."""
    max_new_tokens: int = 256
    """Tokens to generate at most."""
    temperature: float = 0.8
    """Divides the logits before sampling; 0 always takes the likeliest token."""
    top_k: int = 50
    """Sample from this many of the likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens whose probabilities first add up to this."""
    seed: int = 1234
    """Seed of the first sample; each further one adds 1."""
    num_samples: int = 1
    """Texts to generate, one after the other."""
    stop: list[str] = field(default_factory=list)
    """Texts, one or more, that end the generation; they are not printed."""
    tokenizer: Optional[Path] = None
    """Tokenizer folder or file. Default: the one in the run folder, or beside the safetensors file."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products and of the cached keys and values; auto: bf16 on a GPU, fp32 on a CPU."""


@exit_on_user_error
def main(argv: Optional[list[str]] = None) -> None:
    """Load the model, stream the samples, sum up."""
    args = parse(GenerateArgs, _list_stops(sys.argv[1:] if argv is None else argv), __doc__.splitlines()[0])
    _check(args)
    device = _device(args.accelerator)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and device.type == "cuda")
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    with console.status(f"checking {args.checkpoint.name}"):
        weights = Weights.find(args.checkpoint, console.print)
    tokenizer = Tokenizer(args.tokenizer or _tokenizer_of(weights))
    # A corpus that came without a manifest does not say how its documents begin.
    prompt = _encode(_prompt(args), tokenizer, weights.meta.get("document_format") or "bos_eos")

    with console.status(f"loading {weights.path.name}"):
        model = _load(weights, device, bf16)
    where = f"on {device.type} in {'bf16' if bf16 else 'fp32'}"
    console.print(f"{weights.path}: {model.num_parameters():,} parameters, {where}.")
    with torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext():
        for i in range(args.num_samples):
            if args.num_samples > 1:
                console.print(f"sample {i + 1} of {args.num_samples}, seed {args.seed + i}:")
            if console.is_terminal:  # the reader sees where the text goes on from; a pipe gets the new text alone
                console.print(_prompt(args), end="", style="dim")
            console.print(_stream(model, tokenizer, prompt, args, args.seed + i))


def _stream(model: GPT, tokenizer: Tokenizer, prompt: list[int], args: GenerateArgs, seed: int) -> str:
    """Print one sample as it comes; return what it took."""
    device = model.lm_head.weight.device
    cache = new_cache(model, 1, len(prompt) + args.max_new_tokens)
    tokens = generate(
        model,
        torch.tensor(prompt),
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        torch.Generator(device).manual_seed(seed),
        stop_ids=[i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None],  # either one ends the document
        vocab_size=tokenizer.vocab_size,
        cache=cache,
    )
    text = TextStream(tokenizer, before=prompt, stop=args.stop)
    began = time.perf_counter()
    for count, token in enumerate(tokens, start=1):
        if count == 1:
            prefilled = time.perf_counter()
        print(text.push(token), end="", flush=True)
        if text.stopped:
            break
    print(text.flush(), flush=True)
    ended = time.perf_counter()
    # The first token comes out of the prefill; each later one is a step of decoding.
    decode = f"{(count - 1) / (ended - prefilled):,.1f} tokens/s" if count > 1 else "none"
    prefill = f"{len(prompt) / (prefilled - began):,.1f} tokens/s"
    return f"{len(prompt)} + {count} tokens; prefill {prefill}, decode {decode}; cache {cache_bytes(cache):,} bytes"


def _list_stops(argv: list[str]) -> list[str]:
    """`--stop A B` or `--stop A --stop B` as the one JSON list that the parser takes; texts stay as they are."""
    rest, stops, open_flag = [], [], False
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if flag == "--stop":
            open_flag = not equals
            stops += [value] if equals else []
        elif open_flag and not argument.startswith("--"):
            stops.append(argument)
        else:
            open_flag = False
            rest.append(argument)
    return [*rest, f"--stop={json.dumps(stops, ensure_ascii=False)}"] if stops else rest


def _check(args: GenerateArgs) -> None:
    """Refuse what is out of range before anything is loaded."""
    check_sampling(args.temperature, args.top_k, args.top_p)
    for name in ("max_new_tokens", "num_samples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(args, name)}.")
    if args.seed < 0 or args.seed + args.num_samples > 2**63:
        raise UserError(f"--seed must be 0 or more and fit 63 bits, not {args.seed}.")
    if "" in args.stop:
        raise UserError("--stop has an empty text, which would stop before the first token. Leave it out.")


def _device(accelerator: str) -> torch.device:
    if accelerator == "cuda" and not torch.cuda.is_available():
        raise UserError("--accelerator cuda, but PyTorch sees no GPU here. Use --accelerator cpu.")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def _tokenizer_of(weights: Weights) -> Path:
    """The tokenizer folder that belongs to weights."""
    if not weights.tokenizer.is_dir():
        raise UserError(f"{weights.path} comes without a tokenizer ({weights.tokenizer} is missing). Give --tokenizer.")
    return weights.tokenizer


def _prompt(args: GenerateArgs) -> str:
    if args.prompt_file is None:
        return args.prompt
    if args.prompt:
        raise UserError("--prompt and --prompt_file are both given; leave one out.")
    try:
        return args.prompt_file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompt_file {args.prompt_file} cannot be read as UTF-8 text: {error}.") from error


def _encode(prompt: str, tokenizer: Tokenizer, document_format: str) -> list[int]:
    """Ids of the prompt, as a document of the training data would begin."""
    begins = document_format in ("bos_eos", "bos") and tokenizer.bos_id is not None
    ids = [tokenizer.bos_id] * begins + tokenizer.encode(prompt)
    if not ids:
        raise UserError("the prompt is empty, and this model's documents begin with no token. Give a --prompt.")
    return ids


def _load(weights: Weights, device: torch.device, bf16: bool) -> GPT:
    """The trained model; with bf16, its matrices in it, which autocast would else cast at every step."""
    config = ModelConfig.from_dict(weights.meta["model"], str(weights.path))
    with torch.device(device):
        model = GPT(config)
    weights.load_into(model)
    for module in model.modules():
        if bf16 and isinstance(module, nn.Linear) and module.weight is not model.transformer.wte.weight:
            module.to(torch.bfloat16)
    return model.eval()


if __name__ == "__main__":
    main()
