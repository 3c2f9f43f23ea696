"""MagicPIG: properties over random input, dtypes, saved state, and parity on a GPU. What teaches is in its notebooks."""

import copy
import gc
import io
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig
from typer.testing import CliRunner

from paperbook.magicpig import (
    CapturedAttention,
    HashTables,
    KeyIndex,
    LSHConfig,
    MagicPIGCache,
    Signatures,
    SimHash,
    attend_exact,
    choose_config,
    collision_probability,
    decode_attention,
    dense_attention,
    hamming_probability,
    lsh_attention,
    merge_states,
    register,
    speed,
)
from paperbook.magicpig.attention import DecodeMeter
from paperbook.magicpig.cli import app
from paperbook.magicpig.index import draw_keys
from paperbook.magicpig.speed import measure_steps

EVERYTHING = LSHConfig(num_bits=1, num_tables=512, min_length=16, local_tokens=8, dense_layers=())


@pytest.fixture(scope="module")
def tiny():
    register()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=90, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
                         num_key_value_heads=2, max_position_embeddings=512)
    return AutoModelForCausalLM.from_config(config, attn_implementation="magicpig").eval()


@given(seed=st.integers(0, 10**6), keys=st.integers(0, 40), cut=st.integers(0, 40), scale=st.sampled_from([0.1, 1.0, 30.0]))
@settings(max_examples=60, deadline=None)
def test_merge_of_any_split_is_the_whole(seed, keys, cut, scale):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(2, h, n, 8, generator=g, dtype=torch.float64) for h, n in ((6, 3), (2, keys), (2, keys)))
    cut = min(cut, keys)
    want, want_lse = attend_exact(q, k, v, scale)
    parts = [attend_exact(q, k[:, :, part], v[:, :, part], scale) for part in (slice(cut), slice(cut, None))]
    output, lse = merge_states(*parts[0], *parts[1])
    assert torch.allclose(output, want, atol=1e-10) and torch.allclose(lse, want_lse, atol=1e-10)


@given(bits=st.integers(1, 16), tables=st.integers(3, 400), needed=st.integers(1, 3), cos=st.floats(-0.3, 1))
@settings(max_examples=200, deadline=None)
def test_collision_probability_is_the_binomial_tail(bits, tables, needed, cos):
    p = 1 - np.arccos(cos) / np.pi
    want = binom.sf(needed - 1, tables, p**bits)
    got = float(collision_probability(cos, bits, tables, needed))
    assert got == pytest.approx(want, rel=1e-6, abs=1e-12)


@given(seed=st.integers(0, 10**6), n=st.integers(0, 70), bits=st.integers(1, 9), tables=st.integers(2, 40),
       needed=st.integers(1, 3), cut=st.integers(0, 70), skip=st.integers(0, 80))
@settings(max_examples=60, deadline=None)
def test_tables_draw_what_brute_force_draws(seed, n, bits, tables, needed, cut, skip):
    config = LSHConfig(num_bits=bits, num_tables=max(tables, needed), min_collisions=needed)
    g = torch.Generator().manual_seed(seed)
    keys, queries = torch.randn(2, n, 6, generator=g), torch.randn(5, 6, generator=g)
    hasher, rows, first = SimHash(6, config), torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, skip])
    codes = hasher.encode(keys)
    built = HashTables(2, config)
    for piece in (codes[:, :cut], codes[:, cut:]):
        built.append(piece, first)
    ids, counts = built.lookup(hasher.encode(queries), rows)
    for q in range(5):
        met = (codes[rows[q]] == hasher.encode(queries[q])).sum(-1)
        want = {i for i in range(n) if met[i] >= needed and i >= first[rows[q]]}
        assert set(ids[q, : counts[q]].tolist()) == want and len(want) == counts[q]


@pytest.mark.parametrize("method", ["tables", "signature"])
def test_normaliser_is_unbiased_and_a_wrong_part_shows(method):
    """Mean of the estimated normaliser over seeds against the exact one: fails when u, the mean or the merge is wrong."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, h, n, 24, generator=g) for h, n in ((4, 1), (2, 400), (2, 400)))
    k = k + 2 * torch.randn(2, 1, 24, generator=g)
    want = attend_exact(q, k, v, 0.15)[1].double().exp()
    ratios = []
    for seed in range(300):
        config = LSHConfig(method=method, num_bits=5, num_tables=14, signature_bits=128, max_distance=58, weight_floor=0.0, min_length=1, seed=seed)
        index = KeyIndex(SimHash(24, config), config, "numba")
        index.extend(k, torch.tensor([4]), 400 - 64)
        ratios.append(decode_attention(q, k, v, index, 0.15)[1].double().exp() / want)
    ratios = torch.stack(ratios)
    z = (ratios.mean(0) - 1) / (ratios.std(0) / len(ratios) ** 0.5)
    assert z.abs().max() < 4, z


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_dtype_agrees_with_dense(tiny, dtype):
    model = AutoModelForCausalLM.from_config(tiny.config, dtype=dtype).eval()
    model.load_state_dict(tiny.state_dict())
    ids = torch.randint(3, 90, (2, 100), generator=torch.Generator().manual_seed(0))
    logits = {}
    with torch.no_grad():
        for name in ("sdpa", "magicpig"):
            model.set_attn_implementation(name)
            cache = None if name == "sdpa" else MagicPIGCache(model.config, EVERYTHING)
            past = model(ids[:, :99], past_key_values=cache, use_cache=True).past_key_values
            logits[name] = model(ids[:, 99:], past_key_values=past).logits.double()
    assert cache.stats().steps == 1
    gap = (logits["sdpa"] - logits["magicpig"]).abs().max() / logits["sdpa"].std()
    assert gap < (0.1 if dtype == torch.bfloat16 else 1e-3), gap


@pytest.mark.parametrize("method", ["tables", "signature"])
def test_half_precision_is_served_and_kept_in_bfloat16_on_request(tiny, method):
    config = replace(EVERYTHING, method=method, max_distance=255)
    ids = torch.randint(3, 90, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for dtype, kept in ((torch.float16, None), (torch.float32, torch.bfloat16)):
            model = AutoModelForCausalLM.from_config(tiny.config, dtype=dtype).eval()
            model.load_state_dict(tiny.state_dict())
            model.set_attn_implementation("magicpig")
            cache = MagicPIGCache(model.config, replace(config, kv_dtype=kept))
            model(ids[:, :99], past_key_values=cache)
            got = model(ids[:, 99:], past_key_values=cache).logits
            assert cache.layers[0].keys.dtype == (kept or dtype) and cache.stats().share > 0.999
            model.set_attn_implementation("sdpa")
            assert (got - model(ids).logits[:, -1:]).abs().max() / got.std() < 0.1
            model.set_attn_implementation("magicpig")          # the configuration is shared


def test_keys_that_are_not_finite_are_refused():
    config = LSHConfig(min_length=1)
    k = torch.randn(1, 1, 200, 8)
    k[0, 0, 150] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        KeyIndex(SimHash(8, config), config, "numba").extend(k, torch.tensor([4]), 200)


def test_saved_cache_decodes_the_same_tokens(tiny):
    ids = torch.randint(3, 90, (1, 120), generator=torch.Generator().manual_seed(1))
    config = LSHConfig(num_bits=3, num_tables=10, min_length=16, local_tokens=8, dense_layers=())
    with torch.no_grad():
        cache = MagicPIGCache(tiny.config, config)
        tiny(ids, past_key_values=cache)
        buffer = io.BytesIO()
        torch.save(cache, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        token = torch.tensor([[5]])
        assert torch.equal(tiny(token, past_key_values=cache).logits, tiny(token, past_key_values=loaded).logits)


def test_sequences_of_a_batch_do_not_touch_each_other(tiny):
    """A sequence decodes the same alone as left-padded in a batch, with a sampler that draws only some keys."""
    config = LSHConfig(num_bits=3, num_tables=10, min_length=16, local_tokens=8, dense_layers=())
    g = torch.Generator().manual_seed(2)
    long, short, token = torch.randint(3, 90, (1, 150), generator=g), torch.randint(3, 90, (1, 110), generator=g), torch.tensor([[7]])
    with torch.no_grad():
        alone = MagicPIGCache(tiny.config, config)
        tiny(short, past_key_values=alone)
        want = tiny(token, past_key_values=alone).logits[0]
        both = torch.cat([long, torch.cat([torch.zeros(1, 40, dtype=torch.long), short], 1)])
        mask = torch.ones(2, 151, dtype=torch.long)
        mask[1, :40] = 0
        batch = MagicPIGCache(tiny.config, config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        tiny(both, attention_mask=mask[:, :150], position_ids=positions[:, :150], past_key_values=batch)
        got = tiny(token.expand(2, 1), attention_mask=mask, position_ids=positions[:, 150:], past_key_values=batch).logits[1]
    assert (got - want).abs().max() / want.std() < 1e-2


def test_several_tokens_at_once_are_the_same_as_one_by_one(tiny):
    """In float64, where no sign of a projection hangs on the order of a sum."""
    model = AutoModelForCausalLM.from_config(tiny.config, dtype=torch.float64, attn_implementation="magicpig").eval()
    config = LSHConfig(num_bits=4, num_tables=12, min_length=16, local_tokens=8, dense_layers=())
    ids = torch.randint(3, 90, (2, 200), generator=torch.Generator().manual_seed(5))
    logits = []
    with torch.no_grad():
        for chunk in (20, 3, 1):
            cache = MagicPIGCache(model.config, config)
            model(ids[:, :180], past_key_values=cache)
            logits.append(torch.cat([model(ids[:, a : min(a + chunk, 200)], past_key_values=cache).logits for a in range(180, 200, chunk)], 1))
            assert 0.05 < cache.stats().share < 0.9
    assert torch.allclose(logits[0], logits[1], atol=1e-10) and torch.allclose(logits[0], logits[2], atol=1e-10)


@torch.no_grad()
def test_a_refused_step_leaves_a_cache_that_says_so(tiny):
    """After a refusal some layers hold the token and some do not: going on would be silently wrong."""
    ids, mask = torch.randint(3, 90, (2, 150), generator=torch.Generator().manual_seed(6)), torch.ones(2, 151, dtype=torch.long)
    cache = MagicPIGCache(tiny.config, EVERYTHING)
    tiny(ids, past_key_values=cache)
    wrong = mask.clone()
    wrong[0, 20] = 0
    with pytest.raises(ValueError, match="attention_mask"):
        tiny(ids[:, :1], attention_mask=wrong, past_key_values=cache)
    with pytest.raises(RuntimeError, match="new MagicPIGCache"):
        tiny(ids[:, :1], attention_mask=mask, past_key_values=cache)
    cache.reset()
    tiny(ids, past_key_values=cache)
    assert tiny(ids[:, :1], attention_mask=mask, past_key_values=cache).logits.isfinite().all()


@torch.no_grad()
def test_padding_cannot_change_between_forwards(tiny):
    ids, mask = torch.randint(3, 90, (2, 300), generator=torch.Generator().manual_seed(7)), torch.ones(2, 300, dtype=torch.long)
    mask[1, :40] = 0
    cache = MagicPIGCache(tiny.config, EVERYTHING)
    tiny(ids[:, :200], attention_mask=mask[:, :200], past_key_values=cache)
    mask[1, :20] = 1
    with pytest.raises(ValueError, match="attention_mask"):
        tiny(ids[:, 200:], attention_mask=mask, past_key_values=cache)


@torch.no_grad()
def test_forgotten_mask_is_noticed(tiny):
    ids, mask = torch.randint(3, 90, (2, 200), generator=torch.Generator().manual_seed(8)), torch.ones(2, 200, dtype=torch.long)
    mask[1, :40] = 0
    cache = MagicPIGCache(tiny.config, EVERYTHING)
    tiny(ids, attention_mask=mask, past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask"):
        tiny(ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_batch_may_shrink_and_grow_and_be_read_on(tiny):
    ids = torch.randint(3, 90, (3, 330), generator=torch.Generator().manual_seed(9))
    keep = torch.tensor([0, 2])
    logits = {}
    for name in ("sdpa", "magicpig"):
        tiny.set_attn_implementation(name)
        cache = DynamicCache(config=tiny.config) if name == "sdpa" else MagicPIGCache(tiny.config, EVERYTHING)
        tiny(ids[:, :150], past_key_values=cache)
        cache.batch_select_indices(keep)
        tiny(ids[keep, 150:250], past_key_values=cache)
        cache.crop(-95)
        tiny(ids[keep, 155:221], past_key_values=cache)
        logits[name] = tiny(ids[keep, 221:225], past_key_values=cache).logits
    tiny.set_attn_implementation("magicpig")
    assert (logits["sdpa"] - logits["magicpig"]).abs().max() / logits["sdpa"].std() < 1e-3


@pytest.mark.parametrize("change, words", [
    (dict(q=torch.randn(1, 5, 1, 16)), "num_heads"), (dict(v=torch.randn(1, 2, 90, 16)), "k and v"),
    (dict(k=torch.randn(1, 2, 50, 16), v=torch.randn(1, 2, 50, 16)), "index"), (dict(q=torch.randn(4, 1, 16)), "batch, heads"),
])
def test_tensors_that_do_not_fit_are_named(change, words):
    config = LSHConfig(min_length=1)
    k = torch.randn(1, 2, 100, 16)
    index = KeyIndex(SimHash(16, config), config, "numba")
    index.extend(k, torch.tensor([4]), 90)
    for attention in (lsh_attention, decode_attention):
        with pytest.raises(ValueError, match=words):
            attention(**(dict(q=torch.randn(1, 4, 1, 16), k=k, v=k, index=index, scaling=0.25) | change))
        with pytest.raises(ValueError, match="empty"):
            attention(torch.randn(1, 4, 1, 16), k, k, KeyIndex(SimHash(16, config), config, "numba"), 0.25)
        with pytest.raises(ValueError, match="visible"):
            attention(torch.randn(1, 4, 3, 16), k, k, index, 0.25)


SHAPES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 2, 3, 5, 8]), st.sampled_from([1, 1, 2, 5]), st.integers(40, 4500),
                   st.sampled_from([1, 7, 8, 24, 64, 80, 128]))


@given(seed=st.integers(0, 10**6), shape=SHAPES, method=st.sampled_from(["tables", "signature"]), dtype=st.sampled_from([torch.float32, torch.bfloat16]),
       padding=st.integers(0, 30), beside=st.booleans(), sink=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_fused_step_is_the_plain_one_in_float64(seed, shape, method, dtype, padding, beside, sink):
    batch, heads, groups, num_new, tokens, dim = shape
    g = torch.Generator().manual_seed(seed)
    config = LSHConfig(method=method, num_bits=4, num_tables=20, signature_bits=128, max_distance=58, sink_tokens=sink)
    q = torch.randn(batch, heads * groups, num_new, dim, generator=g)
    rows = torch.randn(batch, heads, tokens + 5, 2, dim, generator=g).to(dtype)
    k, v = (rows[:, :, :tokens, 0], rows[:, :, :tokens, 1]) if beside else (rows[..., 0, :].contiguous()[:, :, :tokens], rows[..., 1, :].contiguous()[:, :, :tokens])
    first, position = torch.tensor([sink, sink + padding])[:batch], torch.arange(tokens)
    visible = ((position >= (first - sink)[:, None, None]) & (position <= torch.arange(tokens - num_new, tokens)[:, None]))[:, None]
    index = KeyIndex(SimHash(dim, config), config, "numba")
    index.extend(k, first, tokens - 8)
    meter = DecodeMeter()
    output, lse = decode_attention(q, k, v, index, dim**-0.5, visible, meter)
    drawn = int(draw_keys(index, q)[1].sum())
    assert abs(int(meter.drawn.sum()) - drawn) <= 0.05 * drawn + 3
    # The reference draws from the same index but computes in float64; a query's codes may differ where a projection is nearly zero.
    wide = copy.deepcopy(index)
    wide.mean, wide.inverse_norm = index.mean.double(), index.inverse_norm.double()
    plain, plain_lse = lsh_attention(q.double(), k.double(), v.double(), wide, dim**-0.5, visible)
    assert plain.dtype == torch.float64
    gap = (output - plain).norm(dim=-1) / (plain.norm(dim=-1) + 0.1 * dim**0.5)
    assert (gap < 1e-4).double().mean() > 0.8 and gap.median() < 1e-5, gap
    assert (lse - plain_lse).abs().median() < 1e-4


@given(bits=st.sampled_from([128, 256, 1024]), share=st.floats(0, 0.999), cos=st.floats(-1, 1))
@settings(max_examples=100, deadline=None)
def test_hamming_probability_is_the_binomial_distribution(bits, share, cos):
    near = int(share * bits)
    assert float(hamming_probability(cos, bits, near)) == pytest.approx(binom.cdf(near, bits, np.arccos(cos) / np.pi), rel=1e-9, abs=1e-12)


@given(seed=st.integers(0, 10**6), n=st.integers(0, 2500), bits=st.sampled_from([128, 256, 384]), near=st.floats(0.3, 0.6), cut=st.integers(0, 2500),
       skip=st.integers(0, 80))
@settings(max_examples=40, deadline=None)
def test_signatures_draw_what_brute_force_draws(seed, n, bits, near, cut, skip):
    config = LSHConfig(method="signature", signature_bits=bits, max_distance=int(near * bits))
    g = torch.Generator().manual_seed(seed)
    keys, queries = torch.randn(2, n, 6, generator=g), torch.randn(5, 6, generator=g)
    hasher, rows, first = SimHash(6, config), torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, skip])
    codes, asked = hasher.encode(keys), hasher.encode(queries)
    built = Signatures(2, config)
    for piece in (codes[:, :cut], codes[:, cut:]):
        built.append(piece, first)
    ids, counts = built.lookup(asked, rows)
    for q in range(5):
        distance = [sum(bin(int(a) ^ int(b)).count("1") for a, b in zip(key, asked[q].tolist(), strict=True)) for key in codes[rows[q]].tolist()]
        assert ids[q, : counts[q]].tolist() == [i for i in range(int(first[rows[q]]), n) if distance[i] <= config.max_distance]


@torch.no_grad()
def test_signatures_take_generated_tokens_in(tiny):
    config = replace(EVERYTHING, method="signature", max_distance=255)
    ids = torch.randint(3, 90, (2, 300), generator=torch.Generator().manual_seed(3))
    cache = MagicPIGCache(tiny.config, config)
    tiny(ids[:, :80], past_key_values=cache)
    got = torch.cat([tiny(ids[:, t : t + 1], past_key_values=cache).logits for t in range(80, 300)], 1)
    assert cache.stats().indexed > 200
    tiny.set_attn_implementation("sdpa")
    want = tiny(ids).logits[:, 80:]
    tiny.set_attn_implementation("magicpig")
    assert (got - want).abs().max() / want.std() < 1e-3


def test_a_copy_of_an_index_holds_no_address_of_the_original():
    config = LSHConfig(min_length=1, num_bits=3, num_tables=8)
    k, v, q = torch.randn(1, 2, 300, 16), torch.randn(1, 2, 300, 16), torch.randn(1, 4, 1, 16)
    index = KeyIndex(SimHash(16, config), config, "numba")
    index.extend(k, torch.tensor([4]), 250)
    want = decode_attention(q, k, v, index, 0.25)[0]
    twin = copy.deepcopy(index)
    assert index.arrays is not None and twin.arrays is None
    del index
    gc.collect()
    torch.testing.assert_close(decode_attention(q, k, v, twin, 0.25)[0], want, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 10**6), tokens=st.integers(1, 3000), dim=st.sampled_from([1, 8, 40, 128]), groups=st.integers(1, 8),
       dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=25, deadline=None)
def test_dense_kernel_is_exact(seed, tokens, dim, groups, dtype):
    g = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(1, 2 * groups, 1, dim, generator=g), *torch.randn(2, 1, 2, tokens, dim, generator=g).to(dtype)
    output, lse = dense_attention(q, k, v, 0.3)
    want, want_lse = attend_exact(q.double(), k.double(), v.double(), 0.3)
    assert (output - want).norm() / want.norm() < 1e-5 and (lse - want_lse).abs().max() < 1e-4


@pytest.mark.parametrize("change, words", [(dict(head_dim=100), "head_dim=100"), (dict(context=1000), "context=1000"), (dict(threads=0), "threads=0"),
                                           (dict(batch=0), "batch=0"), (dict(share=1.5), "share=1.5")])
def test_wrong_sizes_of_the_benchmark_are_named(change, words):
    captured = {0: CapturedAttention(torch.randn(2, 300, 64), torch.randn(1, 300, 64), torch.randn(1, 300, 64), 0.125)}
    with pytest.raises(ValueError, match=words):
        measure_steps(captured, **(dict(context=512, kv_heads=1, groups=1) | change))


@pytest.mark.parametrize("as_json", [True, False])
def test_bench_prints_what_it_measured(monkeypatch, as_json):
    captured = {0: CapturedAttention(torch.randn(3, 400, 64), torch.randn(1, 400, 64), torch.randn(1, 400, 64), 0.125)}
    monkeypatch.setattr(speed, "real_keys", lambda: captured)
    monkeypatch.setattr(speed.measure_steps, "__kwdefaults__", speed.measure_steps.__kwdefaults__ | {"sweep_bytes": 1_000_000})
    monkeypatch.setattr(speed, "read_bandwidth", lambda: 1e10)
    arguments = ["bench", "--context", "2048", "--kv-heads", "1", "--repeats", "1", *(["--json"] if as_json else [])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    methods = [*speed.DENSE, "exact TopK", "Quest pages", "MagicPIG tables", "MagicPIG signature"]
    if as_json:
        numbers = json.loads(result.stdout)
        assert [row["method"] for row in numbers["rows"]] == methods
        assert all(row["ms"] > 0 and np.isfinite(row["error"]) and (row["error"] < 0.05 or row["method"] not in speed.DENSE) for row in numbers["rows"])
    else:
        assert all(method in result.stdout for method in methods) and "bytes a key" in result.stdout
    wrong = CliRunner().invoke(app, ["bench", "--context", "2048", "--head-dim", "100"])
    assert wrong.exit_code == 2 and "head_dim=100" in wrong.stderr


@pytest.mark.parametrize("method, option", [("signature", "--num-bits"), ("signature", "--num-tables"), ("tables", "--max-distance")])
def test_an_option_of_the_other_index_is_refused(method, option):
    wrong = CliRunner().invoke(app, ["generate", "--prompt-file", __file__, "--method", method, option, "9"])
    assert wrong.exit_code == 2 and option in wrong.stderr and "Leave it out" in wrong.stderr


def _index(dim=16, **setting):
    config = LSHConfig(min_length=1, **setting)
    index = KeyIndex(SimHash(dim, config), config, "numba")
    index.extend(torch.randn(1, 2, 100, dim), torch.tensor([4]), 90)
    return index


@pytest.mark.parametrize("call, words", [
    (lambda q, k: decode_attention(q, k, k, _index(), math.nan), "scaling=nan"),
    (lambda q, k: decode_attention(q, k, k, _index(), None), "scaling=None"),
    (lambda q, k: decode_attention(q, k, k, _index(dim=8), 0.2), "head_dim 16"),
    (lambda q, k: dense_attention(q, k, k[:, :, :50], 0.2), "do not fit"),
    (lambda q, k: dense_attention(q, k, k.bfloat16(), 0.2), "bfloat16"),
    (lambda q, k: dense_attention(q, k.half(), k.half(), 0.2), "float16"),
    (lambda q, k: dense_attention(q, k.transpose(2, 3).contiguous().transpose(2, 3), k, 0.2), "strides"),
    (lambda q, k: dense_attention(torch.cat([q, q], 2), k, k, 0.2), "one query"),
    (lambda q, k: KeyIndex(SimHash(16, LSHConfig(method="signature")), LSHConfig(), "numba"), "SimHash"),
    (lambda q, k: KeyIndex(SimHash(16, LSHConfig()), LSHConfig(), "auto"), "'auto'"),
    (lambda q, k: _index().extend(k, torch.tensor([4]), 500), "end=500"),
    (lambda q, k: _index().extend(k[0], torch.tensor([4]), 95), "keys"),
    (lambda q, k: _index().extend(k, torch.tensor([0]), 95), "sink_tokens=4"),
    (lambda q, k: choose_config({}, share=0.1), "captured"),
    (lambda q, k: choose_config({0: CapturedAttention(q[0], k[0, :, :60], k[0, :, :60], 0.2)}, share=0.1), "more than"),
    (lambda q, k: choose_config({0: CapturedAttention(q[0], k[0], k[0], 0.2)}, share="5%"), "share='5%'"),
    (lambda q, k: LSHConfig(signature_bits=256.0), "signature_bits=256.0"),
    (lambda q, k: LSHConfig(dense_layers=3.5), "dense_layers=3.5"),
    (lambda q, k: hamming_probability(0.2, 128, 200), "max_distance=200"),
])
def test_wrong_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.randn(1, 4, 1, 16), torch.randn(1, 2, 100, 16))


@pytest.mark.parametrize("method", ["tables", "signature"])
@pytest.mark.parametrize("spoiled", ["q", "k", "v"])
def test_what_is_no_number_stays_visible(method, spoiled):
    tensors = dict(q=torch.randn(1, 4, 1, 16), k=torch.randn(1, 2, 100, 16), v=torch.randn(1, 2, 100, 16))
    tensors[spoiled][..., -1, :] = math.nan
    assert decode_attention(**tensors, index=_index(method=method), scaling=0.2)[0].isnan().any()
