"""The README's Python runs as a plain script, exactly as printed."""

import re
import subprocess
import sys

import pytest


def run(script, folder, environment):
    (folder / "script.py").write_text(script, encoding="utf-8")
    done = subprocess.run([sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def scripts(root):
    return re.findall(r"^```python\n(.*?)^```$", (root / "README.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def script(scripts):
    assert len(scripts) == 7, "the README shows one way to import each chapter"
    return scripts[0]


def check(printed):
    """It wrote something, and it really read a sample: stats name the share of keys drawn."""
    drawn = re.search(r"([\d.]+)% of the indexed keys drawn", printed)
    assert drawn and 0 < float(drawn[1]) < 50, printed
    assert len(printed.split()) > 30, printed


def test_on_a_real_model(script, smollm2, tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    check(run(script, tmp_path, dict(os.environ)))


def test_on_a_random_qwen3(script, smollm2, tmp_path, monkeypatch):
    """The same file, with another architecture where it looks for its model."""
    import os

    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from paperbook.core.assets import find

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=8192)
    folder = tmp_path / "SmolLM2-135M-Instruct"
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    monkeypatch.setenv("PAPERBOOK_ASSETS", str(tmp_path))
    assert find("SmolLM2-135M-Instruct") == folder
    check(run(script, tmp_path, dict(os.environ)))


def test_cogo(scripts, tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    loss, *lines = run(scripts[4], tmp_path, dict(os.environ)).splitlines()
    assert float(loss) < 1e-25 and len(lines) == 11 and all(line.split()[1] in ("4", "6") for line in lines)


def test_q_galore(scripts, smollm2, tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    losses = [float(line) for line in run(scripts[1], tmp_path, dict(os.environ)).split()]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert (tmp_path / "trained" / "model.safetensors").is_file()


def test_welore(scripts, smollm2, tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    said, text = run(scripts[2], tmp_path, dict(os.environ)).split("\n", 1)
    assert 0.88 < float(re.search(r"([\d.]+) of the layers' parameters", said)[1]) <= 0.9 and len(text.split()) > 20
    assert (tmp_path / "small" / "model.safetensors").is_file()


def test_attention_transfer(scripts, tmp_path, monkeypatch):
    import os

    from paperbook.core.assets import AssetMissing, find

    try:
        find("Fashion-MNIST")
    except AssetMissing as error:
        pytest.skip(str(error))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    losses = [float(line) for line in run(scripts[3], tmp_path, dict(os.environ)).split()]
    assert len(losses) == 20 and losses[-1] < losses[0]


def test_ttg(scripts, smollm2, tmp_path, monkeypatch):
    import os

    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    heard, plan = run(scripts[5], tmp_path, dict(os.environ)).splitlines()
    assert '"to": ["Boston", "Chicago"]' in heard and "we have a dog" in heard
    assert plan.endswith("True []") and float(plan.split()[0]) > 0
