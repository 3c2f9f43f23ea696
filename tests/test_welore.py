"""WeLore's wrong input, its rare paths, and properties on random matrices."""

import copy
import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from paperbook.welore import (
    LowRankLinear,
    collect_grams,
    factorize,
    freeze_except_lrc_,
    merge_low_rank_,
    select_ranks,
    singular_spectra,
    welore_compress_,
    whitened_spectra,
)
from paperbook.welore.factors import Gram
from paperbook.welore.ranks import SCORES, break_even, stored
from paperbook.welore.spectra import Spectra, singular_values

SHAPES = dict(vocab_size=40, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPES | dict(num_key_value_heads=2) | changes)).eval()


def compressed(rank=3, **changes):
    model = llama(**changes)
    welore_compress_(model, dict.fromkeys(singular_spectra(model).shapes, rank))
    return model


def ids(rows=2, length=30):
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(1))


# -- properties ------------------------------------------------------------------------------------------------------

sides = st.integers(1, 60)


@settings(max_examples=60, deadline=None)
@given(m=sides, n=sides, seed=st.integers(0, 99), scale=st.sampled_from([1e-12, 1.0, 1e12]))
def test_values_are_those_of_the_svd(m, n, seed, scale):
    W = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) * scale
    wanted = torch.linalg.svdvals(W.double())
    assert (singular_values(W) - wanted).abs().max() <= 1e-6 * wanted[0]


@settings(max_examples=60, deadline=None)
@given(m=sides, n=sides, rank=st.integers(1, 60), seed=st.integers(0, 99), along=st.sampled_from(["weights", "outputs", "loss"]))
def test_factors_are_the_best_of_their_rank(m, n, rank, seed, along):
    generator, rank = torch.Generator().manual_seed(seed), min(rank, m, n)
    W, X, g = torch.randn(m, n, generator=generator), torch.randn(3 * n, n, generator=generator), torch.randn(3 * m, m, generator=generator)
    X, g = X if along != "weights" else torch.eye(n), g if along == "loss" else torch.eye(m)
    U, V = factorize(W, rank, None if along == "weights" else Gram(X.T @ X, g.T @ g if along == "loss" else None), damping=0)
    assert U.shape == (m, rank) and V.shape == (rank, n)

    def seen(E):
        return g.double() @ E.double() @ X.double().T

    best = torch.linalg.svdvals(seen(W))[rank:].square().sum()
    assert abs(seen(W.double() - U.double() @ V.double()).square().sum() - best) <= 1e-5 * seen(W).square().sum()


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(2, 30), st.integers(2, 30)), min_size=1, max_size=5), err=st.floats(0.02, 0.98), method=st.sampled_from(list(SCORES)), seed=st.integers(0, 99))
def test_the_budget_is_met_to_the_rank(shapes, err, method, seed):
    generator = torch.Generator().manual_seed(seed)
    named = {f"layers.{i}.proj": shape for i, shape in enumerate(shapes)}
    spectra = Spectra({name: torch.rand(min(shape), generator=generator).sort(descending=True).values + 0.01 for name, shape in named.items()}, named, of="loss")
    total = sum(map(min, shapes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks = select_ranks(spectra, err, method)
    cut = total - sum(ranks.values())
    assert all(1 <= rank <= min(named[name]) for name, rank in ranks.items())
    assert cut <= round(err * total) and (cut == round(err * total) or 1 in ranks.values())


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(2, 5), st.integers(2, 5)), min_size=1, max_size=3), err=st.floats(0.05, 0.5), seed=st.integers(0, 99))
def test_no_choice_of_the_same_size_costs_less(shapes, err, seed):
    generator = torch.Generator().manual_seed(seed)
    named = {f"layers.{i}.proj": shape for i, shape in enumerate(shapes)}
    spectra = Spectra({name: torch.rand(min(shape), generator=generator).sort(descending=True).values for name, shape in named.items()}, named, of="loss")

    def size(ranks):
        return sum(stored(*named[name], rank) for name, rank in ranks.items())

    def lost(ranks):
        return sum(spectra.values[name][rank:].square().sum().item() for name, rank in ranks.items())

    every = [dict(zip(named, ranks, strict=True)) for ranks in itertools.product(*(range(1, min(shape) + 1) for shape in shapes))]
    within = [ranks for ranks in every if size(ranks) <= (1 - err) * size({name: max(shape) for name, shape in named.items()})]
    if not within:
        with pytest.raises(ValueError, match="at most"):
            select_ranks(spectra, err, budget="params")
        return
    ranks = select_ranks(spectra, err, budget="params")
    assert ranks.method == "loss" and dict(ranks) in within and ranks.threshold > 0
    hull = [(ranks_of, size(ranks_of) * ranks.threshold + lost(ranks_of) / 2) for ranks_of in every]
    assert size(ranks) * ranks.threshold + lost(ranks) / 2 <= min(price for _, price in hull) * (1 + 1e-5) + 1e-7
    assert lost(ranks) <= min(lost(other) for other in within if size(other) <= size(ranks)) + 1e-6


@settings(max_examples=100, deadline=None)
@given(m=st.integers(1, 500), n=st.integers(1, 500))
def test_break_even_is_where_factors_stop_saving(m, n):
    rank = break_even(m, n)
    assert (rank == 0 or stored(m, n, rank) < m * n) and stored(m, n, rank + 1) == m * n


# -- models ----------------------------------------------------------------------------------------------------------

MODELS = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPES, num_key_value_heads=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPES, num_key_value_heads=2, head_dim=6)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)),
    "bert": lambda: BertModel(BertConfig(**SHAPES)),
    "tied llama": lambda: llama(tie_word_embeddings=True),
}


@pytest.mark.filterwarnings("ignore:.*one matrix")
@pytest.mark.parametrize("name", MODELS)
def test_any_model_is_compressed_saved_and_merged(name, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    report = welore_compress_(model, dict.fromkeys(singular_spectra(model).shapes, 4))
    assert report.kept < 0.6 and all(row["kind"] == "low rank" for row in report.rows)
    with torch.no_grad():
        wanted = model(ids())[0]
        model.save_pretrained(tmp_path / "low")
        assert torch.equal(type(model).from_pretrained(tmp_path / "low").eval()(ids())[0], wanted)
        merge_low_rank_(model).save_pretrained(tmp_path / "plain")
        assert "welore" not in (tmp_path / "plain" / "config.json").read_text()
        torch.testing.assert_close(type(model).from_pretrained(tmp_path / "plain").eval()(ids())[0], wanted, rtol=1e-4, atol=1e-5)


def test_a_shared_weight_is_left_dense():
    model = llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    report = welore_compress_(model, dict.fromkeys(singular_spectra(model).shapes, 3))
    assert {row["layer"] for row in report.rows if row["kind"] == "dense"} == {f"model.layers.{i}.mlp.up_proj" for i in (0, 1)}


def test_layers_that_would_grow_are_cut_and_stored_dense_only_when_told():
    model = llama()
    ranks = dict.fromkeys(singular_spectra(model).shapes, 10)  # q_proj: 24 x 24, factors of 480 numbers for 576
    ranks["model.layers.0.self_attn.q_proj"] = 13
    report = welore_compress_(model, ranks, only_lrc=False)
    kinds = {row["layer"]: row["kind"] for row in report.rows}
    assert kinds["model.layers.0.self_attn.q_proj"] == "cut, stored dense" and type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert (singular_values(model.model.layers[0].self_attn.q_proj.weight)[13:] < 1e-5).all()


def test_the_report_adds_up():
    model, dense = llama(), llama()
    report = welore_compress_(model, select_ranks(singular_spectra(model), 0.6))
    mine, whole = (sum(p.numel() for name, p in some.named_parameters() if ".layers." in name and p.ndim > 1) for some in (model, dense))
    assert report.kept == mine / whole
    cut = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    assert report.err == pytest.approx(sum(min(layer.in_features, layer.out_features) - layer.rank for layer in cut) / sum(row["full"] for row in report.rows))
    assert "layers are low-rank" in str(report)


def test_scores_are_those_of_their_definitions():
    s = torch.tensor([5.0, 3, 2, 1], dtype=torch.float64)
    wanted = {"welore": [1, 0.5, 0.25, 0], "uniform": [1, 0.75, 0.5, 0.25], "energy": [1, 14 / 39, 5 / 39, 1 / 39], "loss": [25, 9, 4, 1]}
    assert {name: score(s).tolist() for name, score in SCORES.items()} == {name: pytest.approx(values) for name, values in wanted.items()}


@pytest.mark.parametrize("method", ["welore", "uniform", "energy", "loss"])
def test_a_budget_in_parameters_is_met_and_not_far_exceeded(method):
    model = llama(hidden_size=64, intermediate_size=96)
    spectra = singular_spectra(model) if method != "loss" else whitened_spectra(model, collect_grams(model, [ids(8)]))
    for err in (0.1, 0.3, 0.6):
        ranks = select_ranks(spectra, err, method, "params")
        assert 1 - err - 0.03 < ranks.kept <= 1 - err
        assert ranks.err == 1 - sum(ranks.values()) / sum(map(min, spectra.shapes.values()))


def test_every_other_budget_meets_the_same_report():
    model = llama()
    ranks = select_ranks(singular_spectra(model), 0.5, budget="params")
    assert welore_compress_(model, ranks).kept == ranks.kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_merging_loses_no_more_than_the_dtype(dtype):
    layer = LowRankLinear.from_linear(nn.Linear(30, 20).to(dtype).eval(), 5)
    assert not layer.training and layer.merge().weight.dtype == dtype
    assert torch.equal(layer.merge().weight, (layer.weight.double() @ layer.down.double()).to(dtype)) or dtype == torch.bfloat16
    assert (layer.merge().weight.double() - layer.weight.double() @ layer.down.double()).abs().max() <= torch.finfo(dtype).eps


def test_one_rank_for_three_is_said():
    model = MODELS["gpt2"]()
    with pytest.warns(UserWarning, match="one rank for the three"):
        welore_compress_(model, dict.fromkeys(singular_spectra(model).shapes, 4))


def test_the_command_cuts_what_it_is_told_to(smollm2, tmp_path):
    from transformers import AutoTokenizer
    from typer.testing import CliRunner

    from paperbook.welore.cli import app, token_rows

    words = AutoTokenizer.from_pretrained(smollm2)
    llama(vocab_size=len(words)).save_pretrained(tmp_path / "model"), words.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("one two three four " * 1000)
    assert token_rows(tmp_path / "text.txt", words, 3, "--data").shape == (3, 512)

    outs = iter(range(9))

    def compress(*more):
        return CliRunner().invoke(app, ["compress", "--model", str(tmp_path / "model"), "--err", "0.1", "--out", str(tmp_path / f"out{next(outs)}"), *more], env={"COLUMNS": "200"})

    refused = compress("--method", "uniform", "--budget", "ranks")
    assert refused.exit_code == 2 and "nothing would be cut" in refused.output.lower()
    assert "stored dense" in compress("--method", "uniform", "--budget", "ranks", "--all-layers").output
    assert "whitened_spectra" in compress("--method", "loss").output
    given = ("--calibration", str(tmp_path / "text.txt"), "--rows", "2")
    assert compress(*given).exit_code == 0
    again = compress(*given, "--out", str(tmp_path / "model"))
    assert again.exit_code == 2 and "in use" in again.output
    llama(vocab_size=len(words)).to(torch.bfloat16).save_pretrained(tmp_path / "half"), words.save_pretrained(tmp_path / "half")
    assert compress(*given, "--model", str(tmp_path / "half"), "--out", str(tmp_path / "half-out")).exit_code == 0

    def size(name):
        return (tmp_path / name / "model.safetensors").stat().st_size

    assert size("half-out") < size("half")


def test_nothing_is_changed_by_an_error_on_the_way():
    model = llama()
    shapes = singular_spectra(model).shapes
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        welore_compress_(model, dict.fromkeys(shapes, 3))
    assert not any(isinstance(module, LowRankLinear) for module in model.modules())


def test_a_full_disk_leaves_the_source_alone(tmp_path, monkeypatch):
    llama().save_pretrained(tmp_path / "source")
    before = {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    welore_compress_(model, dict.fromkeys(singular_spectra(model).shapes, 3))

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="space"):
        model.save_pretrained(tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()} == before


def test_models_of_one_configuration_do_not_mark_each_other(tmp_path):
    teacher = llama()
    student = LlamaForCausalLM(teacher.config)
    welore_compress_(student, dict.fromkeys(singular_spectra(student).shapes, 3))
    teacher.save_pretrained(tmp_path)
    assert "welore" not in (tmp_path / "config.json").read_text()


def test_an_incomplete_folder_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    compressed().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "layers.1.mlp.up_proj.down" not in name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no LowRankLinear for model.layers.1.mlp.up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_folder_is_read_with_and_without_a_head(tmp_path):
    model = compressed()
    model.save_pretrained(tmp_path / "whole"), model.model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        wanted = model.model(ids()).last_hidden_state
        for read in (AutoModel.from_pretrained(tmp_path / "whole"), AutoModelForCausalLM.from_pretrained(tmp_path / "base").model):
            assert torch.equal(read.eval()(ids()).last_hidden_state, wanted)


def test_padding_does_not_count():
    model, mask = llama(), torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    padded = ids().clone()
    padded[1, 20:] = 7
    alone = collect_grams(model, [ids()[:1], ids()[1:, :20]])
    left, positions = padded.clone(), torch.arange(30).expand(2, 30).clone()
    left[1], positions[1] = torch.cat([padded[1, 20:], padded[1, :20]]), (torch.arange(30) - 10).clamp(min=0)
    right = {"input_ids": padded, "attention_mask": mask}
    for batch in (right, {"input_ids": left, "attention_mask": mask.flip(1), "position_ids": positions}):
        for name, gram in collect_grams(model, [batch]).items():
            torch.testing.assert_close(tuple(gram), tuple(alone[name]), rtol=1e-4, atol=1e-6)


def inside_inference_mode():
    with torch.inference_mode():
        collect_grams(llama(), [ids()])


def outside(model, given, scalar, name):
    """Second moments at a layer by autograd's own means."""
    seen = {}
    handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0].detach(), y=output) or output.retain_grad())
    scalar(model(**given)).backward()
    handle.remove()
    x, g = (t.reshape(-1, t.shape[-1]) for t in (seen["x"], seen["y"].grad))
    return x.T @ x / len(x), g.T @ g / len(g)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_moments_are_those_of_autograd(name):
    model = llama()
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    wanted = outside(model.train(), {"input_ids": ids(), "labels": ids()}, lambda out: out.loss * 58, name)
    trained = [p.requires_grad for p in model.parameters()]
    torch.testing.assert_close(tuple(collect_grams(model, [ids()])[name]), wanted, rtol=1e-4, atol=1e-7)
    assert [p.requires_grad for p in model.parameters()] == trained and model.training
    assert collect_grams(model, [ids()], gradients=False)[name].gradients is None


def test_labels_that_are_left_out_do_not_count():
    labels = ids().clone()
    labels[:, :17] = -100
    name, given = "model.layers.1.mlp.up_proj", {"input_ids": ids(), "labels": labels}
    wanted = outside(llama(), given, lambda out: out.loss * 26, name)
    torch.testing.assert_close(tuple(collect_grams(llama(), [given])[name]), wanted, rtol=1e-4, atol=1e-7)


def test_padding_of_an_encoder_does_not_count():
    torch.manual_seed(0)
    model, mask = BertModel(BertConfig(**SHAPES), add_pooling_layer=False).eval(), torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    one, two = (collect_grams(model, [{"input_ids": ids().masked_fill(mask == 0, token), "attention_mask": mask}]) for token in (3, 7))
    for name in one:
        torch.testing.assert_close(tuple(one[name]), tuple(two[name]), rtol=1e-4, atol=1e-6)


def test_labels_are_used_where_there_are_some():
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**SHAPES, num_labels=3)).eval()
    given = {"input_ids": ids(), "labels": torch.tensor([0, 2])}
    name = "bert.encoder.layer.1.output.dense"
    wanted = outside(model, given, lambda out: out.loss * 2, name)
    torch.testing.assert_close(tuple(collect_grams(model, [given])[name]), wanted, rtol=1e-4, atol=1e-7)


def test_an_encoder_is_judged_by_its_outputs():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SHAPES), add_pooling_layer=False).eval()
    name = "encoder.layer.1.output.dense"
    many = collect_grams(model, [ids()] * 400)[name].gradients
    def moments(sign):  # of all signs, for each output feature by itself
        return outside(model, {"input_ids": ids()}, lambda out: (out[0] * sign).sum(), name)[1]
    wanted = sum(moments(torch.nn.functional.one_hot(torch.tensor(i), 24)) for i in range(24))
    assert (many - wanted).norm() / wanted.norm() < 0.1


def test_nothing_is_left_behind_by_an_error():
    model = llama()
    with pytest.raises(IndexError):
        collect_grams(model, [ids() + 100])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_the_default_keeps_the_loss_better_than_the_paper():
    torch.manual_seed(0)
    model = llama(hidden_size=48, intermediate_size=96)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad(), model(ids(4), labels=ids(4)).loss.backward(), optimizer.step()

    def loss(model):
        return model(ids(4), labels=ids(4)).loss.item()

    grams, rise = collect_grams(model, [ids(4)]), {}
    for way, ranks, moments in (("ours", select_ranks(whitened_spectra(model, grams), 0.4, budget="params"), grams), ("paper", select_ranks(singular_spectra(model), 0.4, budget="params"), None)):
        made = copy.deepcopy(model)
        assert welore_compress_(made, ranks, moments).kept <= 0.6 + 1e-6
        rise[way] = loss(made) - loss(model)
    assert rise["ours"] < 0.7 * rise["paper"], rise


def test_a_folder_in_shards_is_read_and_a_missing_one_is_named(tmp_path):
    model = compressed()
    model.save_pretrained(tmp_path, max_shard_size=8_000)
    shards = sorted(tmp_path.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    with torch.no_grad():
        assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path).eval()(ids()).logits, model(ids()).logits)
    shards[0].unlink()
    with pytest.raises(OSError, match=shards[0].name):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_spectra_say_what_they_are_of(tmp_path):
    model = llama()
    grams = collect_grams(model, [ids(4)])
    spectra = whitened_spectra(model, grams)
    spectra.save(tmp_path / "spectra.safetensors")
    assert Spectra.load(tmp_path / "spectra.safetensors").of == spectra.of == "loss"
    assert whitened_spectra(model, {name: Gram(gram.inputs) for name, gram in grams.items()}).of == "outputs"


def test_only_the_factors_are_trained():
    model = freeze_except_lrc_(compressed())
    model(ids(), labels=ids()).loss.backward()
    assert {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.grad is not None} == {"weight", "down"}
    assert all("proj" in name for name, p in model.named_parameters() if p.requires_grad)
    normed = freeze_except_lrc_(compressed(), train_norms=True)
    assert any("norm" in name for name, p in normed.named_parameters() if p.requires_grad)


def test_a_copy_computes_the_same():
    model = compressed()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(ids()).logits, model(ids()).logits)
        assert model.to(torch.bfloat16)(ids()).logits.dtype == torch.bfloat16


# -- wrong input -----------------------------------------------------------------------------------------------------


def wrong_inputs():
    spectra = singular_spectra(llama())
    low = dict.fromkeys(spectra.shapes, 3)
    return {
        "err 0": (lambda: select_ranks(spectra, 0), ["err=0"]),
        "err 1": (lambda: select_ranks(spectra, 1.0), ["err=1.0"]),
        "err True": (lambda: select_ranks(spectra, True), ["err=True"]),
        "method": (lambda: select_ranks(spectra, 0.3, "svd"), ["'svd'", "uniform"]),
        "budget": (lambda: select_ranks(spectra, 0.3, budget="bytes"), ["'bytes'", "'params'"]),
        "too small": (lambda: select_ranks(spectra, 0.999, budget="params"), ["err=0.999", "at most"]),
        "no match": (lambda: singular_spectra(llama(), "encoder"), ["encoder", "q_proj"]),
        "rank 0": (lambda: factorize(torch.ones(3, 4), 0), ["rank=0", "1..3"]),
        "unknown layer": (lambda: welore_compress_(llama(), {"model.norm": 3}), ["model.norm"]),
        "missing gram": (lambda: welore_compress_(llama(), low, grams={}), ["grams lacks", "target_modules"]),
        "twice": (lambda: welore_compress_(compressed(), low), ["compressed already"]),
        "nothing low": (lambda: welore_compress_(llama(), {name: min(shape) for name, shape in spectra.shapes.items()}), ["nothing would be cut", "lowest has 1.00"]),
        "rank too large": (lambda: welore_compress_(llama(), low | {"model.layers.1.mlp.up_proj": 100}), ["100", "model.layers.1.mlp.up_proj", "1..24"]),
        "rank of a half": (lambda: welore_compress_(llama(), low | {"model.layers.1.mlp.up_proj": 3.5}), ["3.5", "whole number"]),
        "no ranks": (lambda: welore_compress_(llama(), {}), ["ranks is empty"]),
        "a layer of rank 0": (lambda: LowRankLinear(8, 6, 0), ["rank=0", "1..6"]),
        "a single batch": (lambda: collect_grams(llama(), {"input_ids": ids()}), ["a str", "into a list"]),
        "pairs": (lambda: collect_grams(llama(), [(ids(), ids())]), ["a tuple"]),
        "encoder and decoder": (lambda: collect_grams(T5ForConditionalGeneration(T5Config(vocab_size=40, d_model=24, d_ff=40, d_kv=6, num_layers=1, num_heads=4)), [ids()]), ["get_encoder"]),
        "another width": (lambda: factorize(torch.ones(3, 4), 1, Gram(torch.eye(5))), ["5 inputs", "4"]),
        "nothing to train": (lambda: freeze_except_lrc_(llama()), ["LowRankLinear", "welore_compress_"]),
        "nothing to merge": (lambda: merge_low_rank_(llama()), ["LowRankLinear"]),
        "loss of weights": (lambda: select_ranks(spectra, 0.3, "loss"), ["method='loss'", "whitened_spectra"]),
        "grams of another": (lambda: whitened_spectra(llama(), {"h.0.attn": Gram(torch.eye(24))}), ["h.0.attn", "LlamaForCausalLM"]),
        "inference mode": (inside_inference_mode, ["gradients=True", "gradients=False"]),
        "no calibration": (lambda: collect_grams(llama(), []), ["batches is empty"]),
        "short calibration": (lambda: collect_grams(llama(), [ids(1, 10)]), ["10 inputs", "calibration"]),
    }


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_named(name):
    call, words = wrong_inputs()[name]
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_codes_are_refused(dtype):
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(40, 24).to(dtype), requires_grad=False)
    with pytest.raises(TypeError, match="up_proj.*[Dd]equantize"):
        singular_spectra(model)


def test_what_is_no_spectrum_is_refused(tmp_path):
    with pytest.raises(TypeError, match="LlamaForCausalLM.*singular_spectra"):
        select_ranks(llama())
    with pytest.raises(TypeError, match="one regular expression"):
        singular_spectra(llama(), ["q_proj"])
    with pytest.raises(TypeError, match="merge_and_unload"):
        singular_spectra(get_peft_model(llama(), LoraConfig(target_modules=["q_proj"])))
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model.safetensors.*holds no spectra"):
        singular_spectra(llama(), cache=tmp_path / "model.safetensors")


def test_a_cache_of_other_values_or_weights_is_not_read(tmp_path):
    model, cache = llama(), tmp_path / "spectra.safetensors"
    whitened_spectra(model, collect_grams(model, [ids(4)])).save(cache)
    first = singular_spectra(model, cache=cache)
    assert first.of == "weights"
    model.model.layers[0].mlp.up_proj.weight.data[:, 1:] = 0
    assert singular_spectra(model, cache=cache).values["model.layers.0.mlp.up_proj"][1] < 1e-6 < first.values["model.layers.0.mlp.up_proj"][1]


def test_padding_that_cannot_be_told_is_refused():
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(vocab_size=40, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=24)).eval()
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    padded, alone = collect_grams(model, [{"input_ids": ids(), "attention_mask": mask}]), collect_grams(model, [ids()[:1], ids()[1:, :20]])
    for name in alone:
        torch.testing.assert_close(tuple(padded[name]), tuple(alone[name]), rtol=1e-3, atol=1e-6)

    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(24, 24)])

        def forward(self, x, attention_mask):
            return {"loss": self.layers[0](x.transpose(0, 1)).sum()}

    with pytest.raises(ValueError, match=r"layers.0.*\(30, 2\).*without padding"):
        collect_grams(Shuffled(), [{"x": torch.randn(2, 30, 24), "attention_mask": mask}], "layers", gradients=False)


def test_modes_and_trainability_survive():
    model = llama().requires_grad_(False).train()
    model.model.layers[0].eval()
    collect_grams(model, [ids()])
    assert model.training and not model.model.layers[0].training and not model.model.layers[0].mlp.training
    welore_compress_(model, dict.fromkeys(singular_spectra(model).shapes, 3))
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in merge_low_rank_(model).parameters())


def test_a_layer_in_two_places_is_left_dense():
    model = llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    report = welore_compress_(model, dict.fromkeys(singular_spectra(model).shapes, 3))
    assert {row["kind"] for row in report.rows if "mlp" in row["layer"]} == {"dense"}
    assert model.model.layers[1].mlp is model.model.layers[0].mlp


@pytest.mark.parametrize("values", [torch.ones(4), torch.zeros(4)], ids=["equal", "zero"])
def test_a_flat_spectrum_is_kept_and_said(values):
    spectra = Spectra({"flat": values, "falling": torch.tensor([4.0, 3, 2, 1])}, {"flat": (4, 4), "falling": (4, 4)})
    with pytest.warns(UserWarning, match="flat"):
        assert dict(select_ranks(spectra, 0.25)) == {"flat": 4, "falling": 2}


def test_a_rank_of_nothing_becomes_one():
    spectra = Spectra({"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([9.0, 8.0, 7.0, 6.0])}, {"a": (2, 2), "b": (4, 4)})
    with pytest.warns(UserWarning, match="rank 1"):
        assert min(select_ranks(spectra, 0.95).values()) == 1
