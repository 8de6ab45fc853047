"""Datasets of the hub: the whole program with the real client, against a hub of our own."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from lit_gpt.tokenizer import Tokenizer, train_tokenizer
from lit_gpt.tokens.hub import is_hub_name

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"
WORDS = ["state", "delta", "rule", "gates", "</s>", "alpha", "1", "2", "naïve", "漢字"]


def body(seed):
    return f"{seed}: " + " ".join(random.Random(seed).choices(WORDS, k=60))


@pytest.fixture
def dataset(hub):
    """Three parquet files of 40 documents as sample-10BT, one as CC-MAIN-2024-10; a README that is no data."""
    for i in range(4):
        name = f"sample/10BT/{i:03d}_00000.parquet" if i < 3 else "data/CC-MAIN-2024-10/train-00000-of-00001.parquet"
        path = hub.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({"text": [body(40 * i + k) for k in range(40)], "id": list(range(40))})
        pyarrow.parquet.write_table(table, path, row_group_size=10)
    (hub.folder / "README.md").write_text("about")
    return hub


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer([body(i) for i in range(50)], 340, tmp_path_factory.mktemp("tokenizer")).path


def command(*flags):
    return [sys.executable, str(SCRIPT), *map(str, flags)]


def environment(hub, folder):
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home"), "NO_PROXY": "*", "no_proxy": "*"}


def run(hub, folder, *flags):
    environ = environment(hub, folder)
    return subprocess.run(command(*flags), env=environ, capture_output=True, text=True, timeout=120)


def flags_for(out, tokenizer, source="org/texts", subset="sample-10BT"):
    flags = ["--source", source, "--tokenizer", tokenizer, "--out", out, "--validation_fraction", 0.2]
    return [*flags, "--unit_bytes", 8000, "--workers", 2, *(["--subset", subset] if subset else [])]


def content(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def texts_in(folder):
    tokenizer, found = Tokenizer(folder / "tokenizer"), []
    for path in folder.glob("*.bin"):
        tokens, ends = np.fromfile(path, "<u2", offset=24), np.fromfile(path.with_suffix(".idx"), "<u8").astype(int)
        found += [tokenizer.decode(tokens[begin:end]) for begin, end in zip([0, *ends], ends)]
    return sorted(found)


def test_a_kill_during_a_download_loses_nothing_and_the_commit_stays(dataset, tokenizer, tmp_path):
    whole = run(dataset, tmp_path, *flags_for(tmp_path / "whole", tokenizer))
    assert whole.returncode == 0, whole.stderr
    assert "3 files" in whole.stdout and dataset.commit[:12] in whole.stdout
    assert texts_in(tmp_path / "whole") == sorted(body(i) for i in range(120))
    assert not (tmp_path / "whole" / "downloads").exists()
    names = [f"sample/10BT/{i:03d}_00000.parquet" for i in range(3)]
    assert [name for name, _ in dataset.served] == names, "each file once, nothing else"

    out = tmp_path / "killed"
    dataset.served.clear()
    dataset.brake = names[1]
    process = subprocess.Popen(
        command(*flags_for(out, tokenizer)),
        env=environment(dataset, tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    assert dataset.braked.wait(60)
    process.kill()
    process.wait()
    dataset.release.set()
    dataset.brake, first_commit, dataset.commit = None, dataset.commit, "f" * 40
    assert not (out / "manifest.json").exists()
    assert json.loads((out / "prepare.json").read_text())["hub"]["commit"] == first_commit
    again = run(dataset, tmp_path, *flags_for(out, tokenizer))
    assert again.returncode == 0, again.stderr
    assert first_commit[:12] in again.stdout
    assert content(out) == content(tmp_path / "whole")
    assert [name for name, _ in dataset.served] == [names[i] for i in (0, 1, 1, 2)], "only the cut file came twice"

    dataset.server_close()  # a finished corpus needs no hub
    assert "finished already" in run(dataset, tmp_path, *flags_for(out, tokenizer)).stdout


def test_files_of_finished_units_are_not_fetched_again(dataset, tokenizer, tmp_path):
    flags = flags_for(tmp_path / "out", tokenizer)
    assert run(dataset, tmp_path, *flags).returncode == 0
    whole = content(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").unlink()
    lost = sorted((tmp_path / "out").glob("train*.json"))[-1]  # of the last file
    lost.unlink()
    dataset.served.clear()
    assert run(dataset, tmp_path, *flags).returncode == 0
    assert dataset.served == [("sample/10BT/002_00000.parquet", 0)]
    assert content(tmp_path / "out") == whole


@pytest.mark.parametrize("subset", ["CC-MAIN-2024-10", None])
def test_subsets_lie_where_fineweb_edu_has_them(dataset, tmp_path, subset):
    flags = flags_for(tmp_path / "out", "x", subset=subset)
    flags[flags.index("--tokenizer") : flags.index("--tokenizer") + 2] = ["--train_tokenizer", 330]
    result = run(dataset, tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    assert texts_in(tmp_path / "out") == sorted(body(120 + k) for k in range(40))


def test_jsonl_at_the_root_of_a_dataset(hub, tokenizer, tmp_path):
    lines = [json.dumps({"text": body(i)}) for i in range(20)]
    (hub.folder / "a.jsonl").write_text("\n".join(lines))
    result = run(hub, tmp_path, *flags_for(tmp_path / "out", tokenizer, subset=None))
    assert result.returncode == 0, result.stderr
    assert texts_in(tmp_path / "out") == sorted(body(i) for i in range(20))


def test_what_the_hub_refuses_is_one_line(dataset, tokenizer, tmp_path):
    def refused(*flags):
        result = run(dataset, tmp_path, *flags)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        return result.stderr

    out = tmp_path / "out"
    assert "org/none is neither a file or folder here" in refused(*flags_for(out, tokenizer, "org/none"))
    assert "org/gated is gated" in refused(*flags_for(out, tokenizer, "org/gated"))
    message = refused(*flags_for(out, tokenizer, subset="sample-1T"))
    assert "no subset sample-1T" in message and "CC-MAIN-2024-10, sample-10BT" in message
    assert "no such --revision" in refused(*flags_for(out, tokenizer), "--revision", "nowhere")
    assert "belong to a dataset of the hub" in refused(*flags_for(out, tokenizer, source=tmp_path))
    assert not out.exists()
    dataset.corrupt = "sample/10BT/001_00000.parquet"
    assert "001_00000.parquet of org/texts arrived damaged" in refused(*flags_for(out, tokenizer))
    dataset.corrupt = None
    assert "begun with subset = sample-10BT" in refused(*flags_for(out, tokenizer, subset="CC-MAIN-2024-10"))
    dataset.shutdown()
    dataset.server_close()
    assert "the hub cannot be read" in refused(*flags_for(tmp_path / "other", tokenizer))
    assert not (tmp_path / "other").exists()


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("HuggingFaceFW/fineweb-edu")
    for name in ("books", "./books/a", "/books/a", "../a", "a/b/c", "~/a"):
        assert not is_hub_name(name)
    os.makedirs("HuggingFaceFW/fineweb-edu")
    assert not is_hub_name("HuggingFaceFW/fineweb-edu")
