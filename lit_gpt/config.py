"""Model configurations: dataclasses, and named YAML files in `configs/models`.

    config = ModelConfig.from_name("swa_gdn2_1.3B")
    config = ModelConfig.from_name("swa_gdn2_3M", n_layer=6)
    config = ModelConfig.from_name("my/own/model.yaml")

A block pattern is a list of token mixers, repeated over the depth: `[gdn2]` is the recurrent model, `[gdn2, swa]` the
hybrid of the paper, `[gdn2, gdn2, full]` something of your own.
"""

import difflib
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args, get_origin

import yaml

from lit_gpt.errors import UserError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

MixerName = Literal["gdn2", "swa", "full"]


@dataclass
class GDN2Config:
    """The Gated DeltaNet-2 layer (arXiv 2605.22791). Its defaults are the released 1.3B layer; its options reach from
    there to KDA and Gated DeltaNet.
    """

    num_heads: int = 16
    """Query and key heads."""
    num_value_heads: Optional[int] = None
    """Value heads, a multiple of num_heads; each group of them shares one query and key head. None: as many as
    num_heads.
    """
    head_dim: int = 128
    """Key channels of a head (dk)."""
    expand_v: float = 1.0
    """Value channels of a head over its key channels (dv / dk)."""
    conv_size: int = 4
    """Taps of the causal convolution over q, k and v."""
    decay: Literal["channel", "scalar"] = "channel"
    """Log-decay g: one value per key channel, or one per head (Gated DeltaNet)."""
    decay_rank: int = 128
    """Rank of the projection to the channel-wise decay."""
    erase: Literal["channel", "scalar"] = "channel"
    """Erase gate b: one value per key channel, or one per head."""
    erase_range: float = 1.0
    """b lies in [0, erase_range]; 2 allows negative eigenvalues of the transition."""
    write: Literal["channel", "scalar", "tied"] = "channel"
    """Write gate w: one value per value channel, one per head, or the erase gate itself, which must then be scalar
    (KDA, Gated DeltaNet).
    """
    output_gate: Literal["silu", "sigmoid"] = "silu"
    """Activation of the output gate (SiLU in the paper and its release; sigmoid in KDA)."""
    output_gate_rank: int = 128
    """Rank of the output gate's projection, which then has a bias; 0: one full-rank matrix without."""

    @property
    def value_heads(self) -> int:
        return self.num_value_heads or self.num_heads

    @property
    def value_dim(self) -> int:
        """Value channels of a head (dv)."""
        return round(self.head_dim * self.expand_v)

    def validate(self) -> None:
        _require_positive(self, "num_heads", "num_value_heads", "head_dim", "conv_size", "decay_rank", "erase_range")
        _require(self.value_heads % self.num_heads == 0, "num_value_heads", "a multiple of num_heads")
        whole = self.value_dim == self.head_dim * self.expand_v > 0
        _require(whole, "expand_v", "such that head_dim * expand_v is a whole number of channels")
        _require(self.write != "tied" or self.erase == "scalar", "write", "tied only to a scalar erase gate")
        _require(self.output_gate_rank >= 0, "output_gate_rank", "at least 0")


@dataclass
class AttentionConfig:
    """Softmax attention with rotary positions: sliding window (`swa`) or all past tokens (`full`)."""

    num_heads: int = 18
    """Query heads."""
    num_kv_heads: Optional[int] = None
    """Key and value heads, a divisor of num_heads. None: as many as num_heads."""
    head_dim: int = 128
    """Channels of a head."""
    window: int = 2048
    """Tokens that a `swa` layer sees, itself included."""
    rope_base: float = 10000.0
    """Base of the rotary angles."""

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    def validate(self) -> None:
        _require_positive(self, "num_heads", "num_kv_heads", "head_dim", "window", "rope_base")
        _require(self.num_heads % self.kv_heads == 0, "num_kv_heads", "a divisor of num_heads")
        _require(self.head_dim % 2 == 0, "head_dim", "even, as rotary positions turn pairs of channels")


@dataclass
class ModelConfig:
    """A language model: embedding, n_layer blocks of mixer and SwiGLU MLP, RMSNorm, output head."""

    n_layer: int
    """Blocks, each of one token mixer and one MLP."""
    n_embd: int
    """Width of the residual stream."""
    intermediate_size: int
    """Hidden width of the SwiGLU MLP."""
    block_pattern: list[MixerName] = field(default_factory=lambda: ["gdn2"])
    """Token mixers, repeated over the depth: gdn2, swa (sliding window) or full (attention over all past tokens)."""
    vocab_size: int = 32000
    """Rows of the embedding."""
    tie_embeddings: bool = False
    """Use the embedding as output head too."""
    norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    gdn2: GDN2Config = field(default_factory=GDN2Config)
    """The GDN-2 layers."""
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    """The attention layers."""
    name: str = "unnamed"
    """Where it came from; set by from_name."""

    def __post_init__(self) -> None:
        _require(len(self.block_pattern) > 0, "block_pattern", "at least one mixer")
        _require_positive(self, "n_layer", "n_embd", "intermediate_size", "vocab_size", "norm_eps")
        for name in ("gdn2", "attention"):
            try:
                getattr(self, name).validate()
            except UserError as error:
                raise UserError(f"{name}.{error}") from None

    def mixer(self, layer: int) -> MixerName:
        """The token mixer of block `layer`."""
        return self.block_pattern[layer % len(self.block_pattern)]

    @classmethod
    def from_name(cls, name: str, **overrides) -> "ModelConfig":
        """The model of that name in configs/models, or of a YAML file given by its path. Raises UserError for an
        unknown name or field.
        """
        path = Path(name) if name.endswith(".yaml") else CONFIG_DIR / "models" / f"{name}.yaml"
        if not path.is_file():
            raise UserError(f"unknown model {name!r}. {suggest(name, model_names())}")
        return cls.from_dict({**read_yaml(path), **overrides, "name": path.stem}, source=str(path))

    @classmethod
    def from_dict(cls, values: dict, source: str = "model config") -> "ModelConfig":
        """The inverse of to_dict; raises UserError for a field that is unknown or of the wrong type."""
        return _build(cls, values, source)

    def to_dict(self) -> dict:
        return asdict(self)


def model_names() -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / "models").glob("*.yaml"))


def suggest(name: str, known: list[str]) -> str:
    """What to do about an unknown name: the closest known ones, or all."""
    return f"Known: {', '.join(difflib.get_close_matches(name, known, n=4, cutoff=0.5) or known)}."


def read_yaml(path: Path) -> dict:
    try:
        values = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a YAML file: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold `name: value` lines.")
    return values


def _build(cls: type, values: dict, source: str) -> Any:
    known = {f.name: f for f in fields(cls)}
    arguments = {}
    for name, value in values.items():
        if name not in known:
            raise UserError(f"{source}: unknown field {name!r}. {suggest(str(name), sorted(known))}")
        kind = known[name].type
        if is_dataclass(kind) and isinstance(value, dict):
            value = _build(kind, value, source)
        elif not _fits(value, kind):
            raise UserError(f"{source}: {name} should be {_spell(kind)}, not {value!r}.")
        arguments[name] = value
    try:
        return cls(**arguments)
    except TypeError as error:  # a field without default is missing
        raise UserError(f"{source}: {str(error).partition('__init__() ')[2]}.") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


def _fits(value: Any, kind: Any) -> bool:
    origin, options = get_origin(kind), get_args(kind)
    if origin is Literal:
        return value in options
    if origin is Union:
        return any(_fits(value, option) for option in options)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, options[0]) for v in value)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _spell(kind: Any) -> str:
    if is_dataclass(kind):
        return "a mapping of fields"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is list:
        return f"a list, each {_spell(get_args(kind)[0])}"
    if get_origin(kind) is Union:
        return " or ".join("null" if option is type(None) else _spell(option) for option in get_args(kind))
    return kind.__name__


def _require(condition: bool, name: str, what: str) -> None:
    if not condition:
        raise UserError(f"{name} must be {what}.")


def _require_positive(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(value is None or value > 0, name, f"above 0, not {value}")
