"""Who decays and who does not."""

import torch

from lit_gpt import GPT
from lit_gpt.training.optimizer import OptimizerArgs, adamw, parameter_groups


def tiny(**overrides) -> GPT:
    return GPT.from_name("swa_gdn2_3M", n_layer=2, n_embd=32, intermediate_size=32, vocab_size=64, **overrides)


def is_exempt(name: str) -> bool:
    """Scales and time constants, by what their names end in or hold."""
    return name.endswith(("A_log", "dt_bias", "bias")) or any(part in name for part in ("norm", "conv", "ln_f"))


def test_every_parameter_is_in_one_group_and_only_matrices_and_embeddings_decay():
    model = tiny(tie_embeddings=False)
    groups = {g["name"]: g for g in parameter_groups(model, weight_decay=0.1)}
    names = [n for g in groups.values() for n in g["parameter_names"]]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    assert groups["no decay"]["weight_decay"] == 0 and groups["matrices"]["weight_decay"] == 0.1
    for name in groups["no decay"]["parameter_names"]:
        assert is_exempt(name), name
    assert {n for n in names if n.endswith(("A_log", "dt_bias", "conv.weight"))} <= set(
        groups["no decay"]["parameter_names"]
    )
    assert groups["embeddings"]["parameter_names"] == ["transformer.wte.weight"]
    assert "lm_head.weight" in groups["matrices"]["parameter_names"]


def test_a_tied_head_is_one_parameter():
    model = tiny()
    parameters = [p for g in parameter_groups(model, 0.1) for p in g["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(model.parameters()))


def test_a_step_without_gradient_only_decays_what_should():
    model = tiny()
    optimizer = adamw(model, OptimizerArgs(weight_decay=0.5))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1.0 if is_exempt(name) else 0.95
        torch.testing.assert_close(parameter.detach(), before[name] * kept)
