"""Model configs: names, YAML files, overrides, and one line for what is wrong."""

from dataclasses import asdict

import pytest
import yaml

from lit_gpt.config import ModelConfig, model_names
from lit_gpt.errors import UserError

SMALL = {"n_layer": 3, "n_embd": 32, "intermediate_size": 48}


def error_of(call, *args, **kwargs) -> str:
    """The one line that a call ends in."""
    with pytest.raises(UserError) as raised:
        call(*args, **kwargs)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", model_names())
def test_named_configs_round_trip(name):
    config = ModelConfig.from_name(name)
    assert config.name == name
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.to_dict() == asdict(config) == yaml.safe_load(yaml.safe_dump(config.to_dict()))


def test_patterns_repeat_over_the_depth():
    config = ModelConfig(**{**SMALL, "n_layer": 5}, block_pattern=["gdn2", "gdn2", "full"])
    assert [config.mixer(i) for i in range(5)] == ["gdn2", "gdn2", "full", "gdn2", "gdn2"]


def test_released_models_alternate_from_gdn2():
    assert [ModelConfig.from_name("swa_gdn2_1.3B").mixer(i) for i in range(3)] == ["gdn2", "swa", "gdn2"]
    assert {ModelConfig.from_name("gdn2_1.3B").mixer(i) for i in range(18)} == {"gdn2"}


def test_a_yaml_path_is_a_model(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("n_layer: 3\nn_embd: 32\nintermediate_size: 48\nblock_pattern: [swa]\nattention: {num_heads: 2}\n")
    config = ModelConfig.from_name(str(path))
    assert (config.name, config.n_embd, config.attention.num_heads, config.attention.head_dim) == ("mine", 32, 2, 128)


def test_overrides_win_and_nested_ones_too():
    config = ModelConfig.from_name("swa_gdn2_3M", n_layer=6, gdn2={"num_heads": 4, "num_value_heads": 8})
    assert (config.n_layer, config.gdn2.num_heads, config.gdn2.value_heads) == (6, 4, 8)
    assert config.n_embd == ModelConfig.from_name("swa_gdn2_3M").n_embd


def test_unknown_names_get_near_ones():
    message = error_of(ModelConfig.from_name, "swa_gdn2_1.3b")
    assert "'swa_gdn2_1.3b'" in message and "swa_gdn2_1.3B" in message
    assert all(name in error_of(ModelConfig.from_name, "zzzzzz") for name in model_names())
    assert "unknown model" in error_of(ModelConfig.from_name, "absent.yaml")


@pytest.mark.parametrize(
    "values, words",
    [
        ({"n_layers": 3}, ["'n_layers'", "n_layer"]),
        ({"gdn2": {"num_head": 3}}, ["'num_head'", "num_heads"]),
        ({"attention": {"sliding": 3}}, ["'sliding'", "window"]),
        ({"n_layer": "3"}, ["n_layer", "int", "'3'"]),
        ({"n_layer": 3.5}, ["n_layer", "int"]),
        ({"n_layer": True}, ["n_layer", "int"]),
        ({"tie_embeddings": 1}, ["tie_embeddings", "bool"]),
        ({"norm_eps": "tiny"}, ["norm_eps", "float"]),
        ({"gdn2": 3}, ["gdn2"]),
        ({"gdn2": {"decay": "vector"}}, ["decay", "channel", "scalar"]),
        ({"gdn2": {"num_value_heads": "two"}}, ["num_value_heads", "int or null"]),
        ({"block_pattern": "gdn2"}, ["block_pattern", "list"]),
        ({"block_pattern": ["gdn2", "mamba"]}, ["block_pattern", "gdn2, swa, full"]),
        ({"block_pattern": []}, ["block_pattern", "at least one"]),
        ({"n_layer": 0}, ["n_layer", "above 0"]),
        ({"vocab_size": -1}, ["vocab_size", "above 0"]),
        ({"gdn2": {"num_heads": 2, "num_value_heads": 3}}, ["num_value_heads", "multiple"]),
        ({"gdn2": {"head_dim": 9, "expand_v": 1.5}}, ["expand_v", "whole"]),
        ({"gdn2": {"expand_v": 0}}, ["expand_v"]),
        ({"gdn2": {"write": "tied"}}, ["write", "scalar erase"]),
        ({"gdn2": {"conv_size": 0}}, ["gdn2.conv_size", "above 0"]),
        ({"attention": {"num_heads": 4, "num_kv_heads": 3}}, ["num_kv_heads", "divisor"]),
        ({"attention": {"head_dim": 7}}, ["head_dim", "even"]),
        ({"attention": {"window": 0}}, ["attention.window", "above 0"]),
        ({"attention": {"num_heads": 0}}, ["attention.num_heads", "above 0"]),
        ({"attention": {"num_kv_heads": 0}}, ["attention.num_kv_heads", "above 0"]),
        ({"gdn2": {"num_heads": 0}}, ["gdn2.num_heads", "above 0"]),
        ({"gdn2": {"decay_rank": 0}}, ["gdn2.decay_rank", "above 0"]),
        ({"gdn2": {"output_gate_rank": -1}}, ["gdn2.output_gate_rank", "at least 0"]),
        ({"gdn2": {"erase_range": float("nan")}}, ["gdn2.erase_range", "above 0"]),
        ({1: 2}, ["unknown field 1"]),
    ],
)
def test_wrong_fields_are_named(tmp_path, values, words):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **values}))
    message = error_of(ModelConfig.from_name, str(path))
    assert str(path) in message and all(word in message for word in words), message
    assert all(word in error_of(ModelConfig.from_dict, {**SMALL, **values}) for word in words)


def test_a_missing_field_is_named():
    message = error_of(ModelConfig.from_dict, {"n_layer": 3, "n_embd": 32})
    assert "intermediate_size" in message


@pytest.mark.parametrize("content", ["n_layer: [3", "- a\n- b\n", "", "just text"])
def test_files_that_hold_no_config(tmp_path, content):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    assert str(path) in error_of(ModelConfig.from_name, str(path))


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "binary.yaml"
    path.write_bytes(bytes(range(128, 256)))
    assert "not a YAML file" in error_of(ModelConfig.from_name, str(path))
