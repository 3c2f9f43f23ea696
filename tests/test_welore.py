"""WeLore's wrong input, its rare paths, and properties on random matrices."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from paperbook.welore import (
    LowRankLinear,
    collect_grams,
    factorize,
    merge_low_rank_,
    select_ranks,
    singular_spectra,
    welore_compress_,
)
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
@given(m=sides, n=sides, rank=st.integers(1, 60), seed=st.integers(0, 99), whiten=st.booleans())
def test_factors_are_the_best_of_their_rank(m, n, rank, seed, whiten):
    generator, rank = torch.Generator().manual_seed(seed), min(rank, m, n)
    W, X = torch.randn(m, n, generator=generator), torch.randn(3 * n, n, generator=generator)
    X = X if whiten else torch.eye(n)
    U, V = factorize(W, rank, X.T @ X if whiten else None, damping=0)
    assert U.shape == (m, rank) and V.shape == (rank, n)
    lost = ((W.double() - U.double() @ V.double()) @ X.double().T).square().sum()
    best = torch.linalg.svdvals(W.double() @ X.double().T)[rank:].square().sum()
    assert abs(lost - best) <= 1e-5 * (W @ X.T).square().sum()


@settings(max_examples=60, deadline=None)
@given(shapes=st.lists(st.tuples(st.integers(2, 30), st.integers(2, 30)), min_size=1, max_size=5), err=st.floats(0.02, 0.98), method=st.sampled_from(list(SCORES)), seed=st.integers(0, 99))
def test_the_budget_is_met_to_the_rank(shapes, err, method, seed):
    generator = torch.Generator().manual_seed(seed)
    named = {f"layers.{i}.proj": shape for i, shape in enumerate(shapes)}
    spectra = Spectra({name: torch.rand(min(shape), generator=generator).sort(descending=True).values + 0.01 for name, shape in named.items()}, named)
    total = sum(map(min, shapes))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ranks = select_ranks(spectra, err, method)
    cut = total - sum(ranks.values())
    assert all(1 <= rank <= min(named[name]) for name, rank in ranks.items())
    assert cut <= round(err * total) and (cut == round(err * total) or 1 in ranks.values())


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
    assert "layers are low-rank" in str(report)


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
    for name, gram in collect_grams(model, [{"input_ids": padded, "attention_mask": mask}]).items():
        torch.testing.assert_close(gram, collect_grams(model, [ids()[:1], ids()[1:, :20]])[name], rtol=1e-4, atol=1e-4)
    assert not any(module._forward_pre_hooks for module in model.modules())


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
        "nothing low": (lambda: welore_compress_(llama(), {name: min(shape) for name, shape in spectra.shapes.items()}), ["0.5", "only_lrc=False"]),
        "nothing to merge": (lambda: merge_low_rank_(llama()), ["LowRankLinear"]),
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


def test_codes_are_refused():
    model = llama()
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(40, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="up_proj.*[Dd]equantize"):
        singular_spectra(model)


@pytest.mark.parametrize("values", [torch.ones(4), torch.zeros(4)], ids=["equal", "zero"])
def test_a_flat_spectrum_is_kept_and_said(values):
    spectra = Spectra({"flat": values, "falling": torch.tensor([4.0, 3, 2, 1])}, {"flat": (4, 4), "falling": (4, 4)})
    with pytest.warns(UserWarning, match="flat"):
        assert dict(select_ranks(spectra, 0.25)) == {"flat": 4, "falling": 2}


def test_a_rank_of_nothing_becomes_one():
    spectra = Spectra({"a": torch.tensor([4.0, 1.0]), "b": torch.tensor([9.0, 8.0, 7.0, 6.0])}, {"a": (2, 2), "b": (4, 4)})
    with pytest.warns(UserWarning, match="rank 1"):
        assert min(select_ranks(spectra, 0.95).values()) == 1
