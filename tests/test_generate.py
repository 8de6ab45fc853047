"""The program generate.py on a checkpoint: text, its end, its summary, and one line for whatever is wrong."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric

from generate import main
from lit_gpt.config import AttentionConfig, GDN2Config, ModelConfig
from lit_gpt.model import GPT
from lit_gpt.tokenizer import Tokenizer, train_tokenizer
from lit_gpt.training.checkpoint import Checkpoints
from lit_gpt.training.checkpoint_manifest import write_manifest

ROOT = Path(__file__).resolve().parent.parent
TEXT = "the cat sat on the mat, the café was 5 € away\n"


def save_run(folder: Path, tokenizer: Tokenizer, model: GPT, **meta) -> Path:
    """A run folder with one more checkpoint of `model`, as pretraining leaves it."""
    identity = {k: v for k, v in model.config.to_dict().items() if k != "name"}
    optimizer = torch.optim.AdamW(model.parameters())
    step = 10 * (1 + len(list(folder.glob("checkpoints/step-*"))))
    meta = {"step": step, "model": identity, **meta}
    with Checkpoints(folder / "checkpoints", 2, Fabric(accelerator="cpu", devices=1)) as checkpoints:
        checkpoints.save(model, optimizer, meta)
    tokenizer.save(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return train_tokenizer([TEXT] * 20, 290, tmp_path_factory.mktemp("tokenizer"))


def tiny(tokenizer: Tokenizer, **options) -> GPT:
    torch.manual_seed(0)
    config = ModelConfig(
        n_layer=2,
        n_embd=32,
        intermediate_size=48,
        block_pattern=["gdn2", "swa"],
        gdn2=GDN2Config(num_heads=2, head_dim=8, decay_rank=8, output_gate_rank=8),
        attention=AttentionConfig(num_heads=2, head_dim=8, window=16),
        **{"vocab_size": tokenizer.vocab_size, **options},
    )
    return GPT(config)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokenizer) -> Path:
    """A run whose model knows TEXT by heart; and a checkpoint from before, which does not."""
    model, folder = tiny(tokenizer), tmp_path_factory.mktemp("trained")
    save_run(folder, tokenizer, model)
    ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(TEXT), tokenizer.eos_id])[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(80):
        loss = model(ids[:, :-1], ids[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    return save_run(folder, tokenizer, model)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory, tokenizer) -> Path:
    """A run whose model has more ids than its tokenizer and no idea."""
    return save_run(
        tmp_path_factory.mktemp("untrained"), tokenizer, tiny(tokenizer, vocab_size=512, tie_embeddings=True)
    )


def run(capsys, checkpoint: Path, *flags: str) -> tuple[str, str]:
    """What generate.py writes to standard output and to standard error."""
    main(["--checkpoint", str(checkpoint), "--accelerator", "cpu", *flags])
    return capsys.readouterr()


def fail(capsys, checkpoint: Path, *flags: str) -> str:
    """Its one line of error, which may follow the line that names the model."""
    with pytest.raises(SystemExit) as ended:
        main(["--checkpoint", str(checkpoint), *flags])
    out, err = capsys.readouterr()
    *before, last = err.splitlines()
    assert ended.value.code == 2 and out == "" and last.startswith("error: ")
    assert not before or (len(before) == 1 and "/step-" in before[0]), err
    return last


def test_a_learned_text_comes_back_and_ends_at_the_end_of_its_document(capsys, trained, tokenizer):
    out, err = run(capsys, trained, "--temperature", "0")
    assert out == TEXT + "\n"
    count = len(tokenizer.encode(TEXT)) + 1
    assert re.search(
        rf"1 \+ {count} tokens; prefill [\d,.]+ tokens/s, decode [\d,.]+ tokens/s; cache [\d,]+ bytes", err
    )
    assert "step-00000020" in err


def test_a_prompt_is_continued_from_its_last_character_on(capsys, trained, tokenizer, tmp_path):
    prompt, ids = tmp_path / "prompt.txt", tokenizer.encode(TEXT)
    for cut in (2, len(ids) // 2, len(ids) - 1):
        start = tokenizer.decode(ids[:cut])
        assert tokenizer.encode(start) == ids[:cut]
        prompt.write_text(start)
        expected = TEXT[len(start) :] + "\n"
        assert run(capsys, trained, "--prompt", start, "--temperature", "0").out == expected
        assert run(capsys, trained, "--prompt_file", str(prompt), "--temperature", "0").out == expected


def test_stop_strings_end_the_text_and_are_not_printed(capsys, trained):
    for flags in (["--stop", ", the"], ["--stop", "absent", ", the"], ["--stop=absent", "--stop", ", the"]):
        assert run(capsys, trained, "--temperature", "0", *flags).out == "the cat sat on the mat\n"
    out, _ = run(capsys, trained, "--stop", "\n", "--temperature", "0")
    assert out == TEXT
    assert run(capsys, trained, "--stop", "[1]", '"', "--temperature", "0").out == TEXT + "\n"


def test_length_is_bounded(capsys, trained, tokenizer):
    out, err = run(capsys, trained, "--temperature", "0", "--max_new_tokens", "5")
    assert out == tokenizer.decode(tokenizer.encode(TEXT)[:5]) + "\n"
    assert "1 + 5 tokens" in err
    assert "decode none" in run(capsys, trained, "--max_new_tokens", "1").err


def test_run_folder_means_its_newest_checkpoint(capsys, trained):
    newest, oldest = trained / "checkpoints" / "step-00000020", trained / "checkpoints" / "step-00000010"
    assert run(capsys, newest, "--temperature", "0").out == run(capsys, trained, "--temperature", "0").out
    assert run(capsys, oldest, "--temperature", "0").out != run(capsys, trained, "--temperature", "0").out


def test_seed_decides_the_text_and_each_sample_has_its_own(capsys, untrained):
    sample = lambda *flags: run(capsys, untrained, "--max_new_tokens", "20", "--prompt", "the", *flags).out
    assert sample() == sample("--seed", "1234") != sample("--seed", "1235")
    assert sample("--num_samples", "2") == sample() + sample("--seed", "1235")


def test_ids_without_text_are_not_sampled(capsys, untrained):
    out, _ = run(capsys, untrained, "--temperature", "100", "--top_k", "0", "--max_new_tokens", "60")
    assert len(out) > 10 and "\u2047" not in out


def test_documents_without_a_begin_token_get_none(capsys, tmp_path, tokenizer):
    count = len(tokenizer.encode("the cat"))
    for document_format, begin in (("bos", 1), ("bos_eos", 1), (None, 1), ("eos", 0)):
        folder = save_run(tmp_path / str(document_format), tokenizer, tiny(tokenizer), document_format=document_format)
        assert f"\n{count + begin} + " in run(capsys, folder, "--prompt", "the cat").err
    assert "--prompt" in fail(capsys, folder)


@pytest.mark.parametrize("tied", [False, True])
def test_bf16_stays_close_to_fp32(capsys, tmp_path, tokenizer, tied):
    folder = save_run(tmp_path, tokenizer, tiny(tokenizer, tie_embeddings=tied))
    out, err = run(capsys, folder, "--precision", "bf16", "--max_new_tokens", "4")
    assert out and "in bf16" in err
    cache = [int(re.search(r"cache ([\d,]+) bytes", e)[1].replace(",", "")) for e in (err, run(capsys, folder).err)]
    state = 2 * 8 * 8 * 4
    assert (
        cache[0] - state == (cache[1] - state) // 2
    )  # keys, values and convolution inputs halve; the state stays fp32


@pytest.mark.slow
def test_the_script_runs_on_its_own(trained):
    command = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", str(trained), "--temperature", "0"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stdout.decode()) == (0, TEXT + "\n"), done.stderr.decode()


def test_wrong_checkpoints(capsys, trained, tmp_path):
    assert "not there" in fail(capsys, tmp_path / "absent")
    assert "no checkpoint" in fail(capsys, tmp_path)
    (tmp_path / "checkpoints" / ".step-00000010.tmp").mkdir(parents=True)
    assert "no checkpoint" in fail(capsys, tmp_path)

    copy = shutil.copytree(trained, tmp_path / "copy")
    step = copy / "checkpoints" / "step-00000020"
    meta = json.loads((step / "meta.json").read_text())
    change_meta(step, {**meta, "format": 99})
    assert "format 99" in fail(capsys, copy)
    change_meta(step, {**meta, "model": {**meta["model"], "n_embd": 48}})
    assert "cannot be read" in fail(capsys, copy)


def change_meta(step: Path, meta: dict) -> None:
    """Let a checkpoint say something else of itself, its manifest included."""
    text = json.dumps(meta).encode()
    (step / "meta.json").write_bytes(text)
    files = json.loads((step / "manifest.json").read_text())["files"]
    write_manifest(step, {**files, "meta.json": {"bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}})


def test_a_damaged_checkpoint_is_passed_over_or_refused(capsys, trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "copy")
    older, newer = (copy / "checkpoints" / f"step-000000{n}" for n in (10, 20))
    file = newer / "model-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    out, err = run(capsys, copy, "--temperature", "0")
    assert out == run(capsys, older, "--temperature", "0").out
    assert "step-00000020 is damaged" in err and "step-00000010:" in err
    assert "step-00000020 is damaged: model-00000" in fail(capsys, newer)
    (older / "meta.json").unlink()
    assert "step-00000010 (meta.json is missing)" in fail(capsys, copy)


def test_wrong_tokenizers(capsys, trained, tmp_path, tokenizer):
    copy = shutil.copytree(trained, tmp_path / "copy")
    shutil.rmtree(copy / "tokenizer")
    assert "--tokenizer" in fail(capsys, copy)
    assert run(capsys, copy, "--tokenizer", str(trained / "tokenizer"), "--temperature", "0").out == TEXT + "\n"
    larger, unknown = train_tokenizer([TEXT] * 20, 310, tmp_path / "larger"), tokenizer.vocab_size
    flags = ["--tokenizer", str(larger.path), "--prompt", larger.decode([unknown])]
    assert f"token id {unknown}" in fail(capsys, trained, *flags)


def test_wrong_arguments(capsys, trained, tmp_path):
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"caf\xe9")
    cases = {
        ("--prompt", "a", "--prompt_file", str(latin)): "both",
        ("--prompt_file", str(latin)): "UTF-8",
        ("--prompt_file", str(tmp_path / "absent")): "absent",
        ("--accelerator", "tpu"): "accelerator",
        ("--precision", "fp8"): "precision",
        ("--temperature", "-1"): "temperature",
        ("--top_k", "-1"): "top_k",
        ("--top_p", "0"): "top_p",
        ("--max_new_tokens", "0"): "max_new_tokens",
        ("--num_samples", "0"): "num_samples",
        ("--seed", "-1"): "seed",
        ("--stop", ""): "stop",
        ("--temprature", "1"): "temprature",
    }
    if not torch.cuda.is_available():
        cases["--accelerator", "cuda"] = "no GPU"
    for flags, word in cases.items():
        assert word in fail(capsys, trained, *flags), flags
    with pytest.raises(SystemExit, match="2"):
        main([])
    assert "checkpoint" in capsys.readouterr().err


def test_a_diverged_model_is_reported(capsys, tmp_path, tokenizer):
    model = tiny(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    save_run(tmp_path, tokenizer, model)
    assert "diverged" in fail(capsys, tmp_path)
