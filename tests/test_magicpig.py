"""MagicPIG: properties over random input, dtypes, saved state, and parity on a GPU. What teaches is in its notebooks."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from paperbook.magicpig import (
    HashTables,
    KeyIndex,
    LSHConfig,
    MagicPIGCache,
    SimHash,
    attend_exact,
    collision_probability,
    lsh_attention,
    merge_states,
    register,
)

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


def test_normaliser_is_unbiased_and_a_wrong_part_shows():
    """Mean of the estimated normaliser over seeds against the exact one: fails when u, the mean or the merge is wrong."""
    g = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, h, n, 24, generator=g) for h, n in ((4, 1), (2, 400), (2, 400)))
    k = k + 2 * torch.randn(2, 1, 24, generator=g)
    want = attend_exact(q, k, v, 0.15)[1].double().exp()
    ratios = []
    for seed in range(300):
        config = LSHConfig(num_bits=5, num_tables=14, weight_floor=0.0, min_length=1, seed=seed)
        index = KeyIndex(SimHash(24, config), config, "numba")
        index.extend(k, torch.tensor([4]), 400 - 64)
        ratios.append(lsh_attention(q, k, v, index, 0.15)[1].double().exp() / want)
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


def test_numba_refuses_half_precision_by_name(tiny):
    model = AutoModelForCausalLM.from_config(tiny.config, dtype=torch.bfloat16).eval()
    model.set_attn_implementation("magicpig")
    forced = MagicPIGCache(model.config, LSHConfig(**(EVERYTHING.__dict__ | {"backend": "numba"})))
    with pytest.raises(ValueError, match="backend='numba'.*bfloat16"), torch.no_grad():
        model(torch.ones(1, 100, dtype=torch.long), past_key_values=forced)


def test_keys_that_are_not_finite_are_refused():
    config = LSHConfig(min_length=1)
    k = torch.randn(1, 1, 200, 8)
    k[0, 0, 150] = float("inf")
    with pytest.raises(ValueError, match="NaN or infinity"):
        KeyIndex(SimHash(8, config), config, "numba").extend(k, torch.tensor([0]), 200)


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
    (dict(k=torch.randn(1, 2, 100, 16).half(), v=torch.randn(1, 2, 100, 16).half()), "float16"),
])
def test_tensors_that_do_not_fit_are_named(change, words):
    config = LSHConfig(min_length=1)
    k = torch.randn(1, 2, 100, 16)
    index = KeyIndex(SimHash(16, config), config, "numba")
    index.extend(k, torch.tensor([0]), 90)
    with pytest.raises(ValueError, match=words):
        lsh_attention(**(dict(q=torch.randn(1, 4, 1, 16), k=k, v=k, index=index, scaling=0.25) | change))
    with pytest.raises(ValueError, match="empty"):
        lsh_attention(torch.randn(1, 4, 1, 16), k, k, KeyIndex(SimHash(16, config), config, "numba"), 0.25)
