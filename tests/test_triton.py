"""magicpig's Triton kernels against float64: in Triton's interpreter here, compiled and for real under `-m gpu`."""

import importlib
import math
import os
import subprocess
import sys

import pytest
import torch

from paperbook.core.kernels import BackendUnavailable, check_against_reference, relative_error

CUDA = torch.cuda.is_available()


def import_kernels():
    """The module under test, interpreted where there is no GPU.

    Triton decides when it is imported, and transformers, which other tests load first, imports it: then it has to be
    imported anew. The variable is not left behind, since tests of the choice of backend and notebooks would see it.
    """
    pytest.importorskip("triton")
    if CUDA:
        return importlib.import_module("paperbook.magicpig.triton")
    importlib.import_module("paperbook.magicpig")
    for name in [name for name in sys.modules if name == "paperbook.magicpig.triton" or name.split(".")[0] == "triton"]:
        if not name.startswith("triton._C"):  # the extension module can be loaded once only
            del sys.modules[name]
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        return importlib.import_module("paperbook.magicpig.triton")
    finally:
        os.environ.pop("TRITON_INTERPRET") if before is None else os.environ.update(TRITON_INTERPRET=before)


kernels = import_kernels()
pytestmark = pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.skipif(CUDA, reason="kernels are compiled here: see the cases for cuda")),
    pytest.param("cuda", marks=pytest.mark.gpu)])
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not CUDA:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def randn(*shape, seed=0, device="cpu", dtype=torch.float32):
    """Gaussian numbers that are the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def random_words(*shape, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=generator).to(device)


def signs_agree(bits, x, projections):
    """Every bit is the sign of its float64 projection, unless that is within 1e-4 of zero."""
    x, projections = x.double(), projections.double()
    exact = x @ projections
    close = exact.abs() < 1e-4 * x.norm(dim=-1, keepdim=True) * projections.norm(dim=0)
    return bool(((bits == (exact > 0)) | close).all()) and close.float().mean() < 0.02


# ---- sign bits ----


@pytest.mark.parametrize("shape, bits, dtype", [
    ((37, 8), 64, "f32"), ((3, 11, 24), 128, "bf16"), ((65, 64), 256, "f32"), ((1, 128), 192, "f16"),
    ((2, 1, 5, 40), 64, "bf16"), ((1, 72), 128, "f32")])
def test_signatures(device, shape, bits, dtype):
    x, r = randn(*shape, device=device, dtype=DTYPES[dtype]), randn(shape[-1], bits, seed=1, device=device)
    words = kernels.encode_signatures(x, r)
    assert words.shape == (*shape[:-1], bits // 64) and words.dtype == torch.int64
    unpacked = kernels.unpack_bits(words)
    assert signs_agree(unpacked, x, r)
    assert torch.equal(unpacked.view(*shape[:-1], -1, 64)[..., 0], words & 1 == 1)  # lowest bit first


@pytest.mark.parametrize("num_bits, tables", [(1, 3), (7, 5), (10, 9), (13, 4), (16, 6)])
def test_codes(device, num_bits, tables):
    x, r = randn(21, 24, seed=num_bits, device=device), randn(24, num_bits * tables, seed=1, device=device)
    codes = kernels.encode_codes(x, r, num_bits)
    assert codes.shape == (21, tables) and codes.dtype == torch.int32
    assert 0 <= codes.min() and codes.max() < 2**num_bits
    bits = (codes[..., None] >> torch.arange(num_bits, device=device)) & 1
    assert signs_agree(bits.bool().flatten(-2), x, r)


def test_vectors_of_any_strides(device):
    x, r = randn(9, 3, 24, device=device), randn(24, 64, seed=1, device=device)
    assert torch.equal(kernels.encode_signatures(x.transpose(0, 1), r), kernels.encode_signatures(x, r).transpose(0, 1))
    assert torch.equal(kernels.encode_signatures(x[:, 1], r), kernels.encode_signatures(x, r)[:, 1])
    assert kernels.encode_signatures(x[:0], r).shape == (0, 3, 1)
    wide = torch.cat([x, torch.full_like(x, math.nan)], -1)  # neighbours that must not be read
    assert torch.equal(kernels.encode_signatures(wide[..., :24], r), kernels.encode_signatures(x, r))
    inner = torch.cat([r, torch.full_like(r, math.nan)], 1)[:, :64]
    assert torch.equal(kernels.encode_signatures(x[..., :8], inner[:8]), kernels.encode_signatures(x[..., :8], r[:8]))


# ---- the scan ----


@pytest.mark.parametrize("rows, n, groups, bits, distance", [
    (2, 257, 3, 64, 30), (1, 511, 4, 256, 121), (3, 19, 1, 128, 60), (1, 1, 8, 128, 64), (2, 300, 4, 64, 64),
    (1, 256, 1, 192, 0), (1, 700, 8, 64, 25)])
def test_scan(device, rows, n, groups, bits, distance):
    words = random_words(rows, n, bits // 64, seed=n, device=device)
    queries = random_words(rows, groups, bits // 64, seed=1, device=device)
    queries[:, -1] = words[:, n // 2]  # one exact match, one complement, and random ones
    words[:, 0] = ~queries[:, 0]
    ids, counts = kernels.scan_signatures(words, queries, distance)
    wanted_ids, wanted_counts = kernels.reference_scan(words, queries, distance)
    assert torch.equal(counts, wanted_counts) and ids.dtype == counts.dtype == torch.int32
    kept = torch.arange(n, device=device) < counts[..., None]
    assert torch.equal(ids[kept], wanted_ids[kept])
    assert (counts == n).all() or distance < bits
    for row in range(rows):
        for head in range(groups):
            a, b = words[row].tolist(), queries[row, head].tolist()
            near = [i for i, key in enumerate(a)
                    if sum(((x ^ y) % 2**64).bit_count() for x, y in zip(key, b, strict=True)) <= distance]
            assert ids[row, head, : counts[row, head]].tolist() == near


def test_scan_of_nothing_and_of_a_view(device):
    words, queries = random_words(2, 90, 2, device=device), random_words(2, 3, 2, seed=1, device=device)
    ids, counts = kernels.scan_signatures(words[:, :0], queries, 5)
    assert ids.shape == (2, 3, 0) and counts.tolist() == [[0] * 3] * 2
    inner = kernels.scan_signatures(words[:, 7:80], queries, 62)
    whole = kernels.scan_signatures(words[:, 7:80].contiguous(), queries, 62)
    assert torch.equal(inner[1], whole[1]) and inner[1].min() > 0


# ---- attention over a draw ----


def drawn_case(device, rows, groups, n, dim, dtype="f32", scaling=0.2, share=0.3, splits=None, seed=0):
    q, keys, values = (randn(*s, seed=seed + i, device=device, dtype=DTYPES[dtype])
                       for i, s in enumerate([(rows, groups, dim), (rows, n, dim), (rows, n, dim)]))
    mean = keys.float().mean(1) + 0.3
    chosen = torch.rand(rows, groups, n, generator=torch.Generator().manual_seed(seed)) < share
    return dict(q=q, keys=keys, values=values, mean=mean, ids=(~chosen).int().argsort(-1).int().to(device),
                inverse_norm=1 / (keys.float() - mean[:, None]).norm(dim=-1), counts=chosen.sum(-1).int().to(device),
                log_u=kernels.signature_log_u(64, 26, device=device), scaling=scaling, splits=splits)


def plain(splits, **case):
    return kernels.reference_attention(**case)


@pytest.mark.parametrize("rows, groups, n, dim, dtype, scaling, share, splits", [
    (2, 3, 131, 64, "f32", 0.125, 0.4, None), (1, 4, 97, 24, "bf16", 0.2, 0.5, 3), (3, 1, 33, 8, "f16", 0.5, 0.6, 1),
    (1, 8, 65, 64, "bf16", 0.125, 0.2, 5), (1, 1, 1, 8, "f32", 1.0, 1.1, 2), (2, 4, 40, 72, "f32", 50.0, 0.5, 2),
    (2, 2, 30, 16, "f32", 0.2, 0.0, None), (1, 2, 150, 16, "f32", 2.0, 0.8, 1), (1, 3, 200, 128, "f32", 0.09, 1.1, 7)])
def test_sampled_attention(device, rows, groups, n, dim, dtype, scaling, share, splits):
    case = drawn_case(device, rows, groups, n, dim, dtype, scaling, share, splits, seed=n)
    check_against_reference({"triton": kernels.sampled_attention}, plain, [("case", case)], rtol=5e-5)


def test_weights_are_those_of_the_formula(device):
    """The table is interpolated; the binomial tail itself, summed in float64, is what it must come to."""
    case = drawn_case(device, 1, 2, 60, 32, share=0.7)
    mean, q = case["mean"].double(), case["q"].double()
    for head in range(2):
        i = case["ids"][0, head, : case["counts"][0, head]].long()
        keys = case["keys"][0, i].double()
        cos = torch.cosine_similarity(keys - mean, q[0, head][None])
        differs = torch.arccos(cos) / math.pi
        u = sum(math.comb(64, j) * differs**j * (1 - differs) ** (64 - j) for j in range(27))
        weight = (keys @ q[0, head] * case["scaling"] - torch.log(u + 1e-4)).softmax(0)
        assert relative_error(kernels.sampled_attention(**case)[0][0, head], weight @ case["values"][0, i].double()) < 2e-4


def test_an_empty_draw_is_zero_with_no_weight(device):
    case = drawn_case(device, 2, 3, 50, 16)
    case["counts"][0, 1] = 0
    output, lse = kernels.sampled_attention(**case)
    assert not output[0, 1].any() and lse[0, 1] == -math.inf
    assert output.isfinite().all() and lse.isinf().sum() == 1


def test_hostile_input_stays_finite(device):
    case = drawn_case(device, 1, 2, 50, 16, share=0.5)
    zero_query = dict(case, q=torch.zeros_like(case["q"]))
    no_direction = dict(case, inverse_norm=torch.zeros_like(case["inverse_norm"]))
    too_long = dict(case, inverse_norm=case["inverse_norm"] * 50)  # cosines beyond 1 by far
    check_against_reference({"triton": kernels.sampled_attention}, plain,
                            [("zero query", zero_query), ("no direction", no_direction), ("clipped", too_long)], rtol=5e-5)
    for some in (zero_query, no_direction, too_long):
        assert all(part.isfinite().all() for part in kernels.sampled_attention(**some))


def test_what_lies_behind_the_counts_is_never_read(device):
    case = drawn_case(device, 2, 2, 70, 24, "bf16")
    wanted = kernels.sampled_attention(**case)
    behind = torch.arange(70, device=device) >= case["counts"][..., None]
    drawn = torch.zeros(2, 70, dtype=torch.bool, device=device)
    for row, head in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        drawn[row, case["ids"][row, head, : case["counts"][row, head]].long()] = True
    poisoned = dict(case, ids=case["ids"].masked_fill(behind, 2**31 - 1),
                    keys=case["keys"].masked_fill(~drawn[..., None], math.nan),
                    values=case["values"].masked_fill(~drawn[..., None], math.nan))
    assert not drawn.all()
    assert all(torch.equal(a, b) for a, b in zip(kernels.sampled_attention(**poisoned), wanted, strict=True))


def test_caches_with_strides_of_their_own(device):
    case = drawn_case(device, 2, 3, 41, 24)
    cache = torch.full((60, 2, 2, 24), math.nan, device=device)
    cache[5:46, :, 0], cache[5:46, :, 1] = case["keys"].transpose(0, 1), case["values"].transpose(0, 1)
    keys, values = cache[5:46].permute(2, 1, 0, 3)
    norms = torch.cat([torch.full((2, 3), math.nan, device=device), case["inverse_norm"]], 1)[:, 3:]
    got = kernels.sampled_attention(**dict(case, keys=keys, values=values, inverse_norm=norms))
    assert all(torch.equal(a, b) for a, b in zip(got, kernels.sampled_attention(**case), strict=True))


# ---- the whole step ----


def step_case(device, rows=2, groups=3, n=140, dim=24, bits=64, distance=28, sink=4, local=33, dtype="f32"):
    q, keys, values = (randn(*s, seed=i, device=device, dtype=DTYPES[dtype])
                       for i, s in enumerate([(rows, groups, dim), (rows, n, dim), (rows, n, dim)]))
    keys = keys + 2 * randn(rows, 1, dim, seed=4, device=device, dtype=DTYPES[dtype])
    projections = randn(dim, bits, seed=3, device=device)
    words, mean, inverse_norm = kernels.index_keys(keys[:, sink : n - local], projections)
    return dict(q=q, keys=keys, values=values, projections=projections, words=words, mean=mean, inverse_norm=inverse_norm,
                log_u=kernels.signature_log_u(bits, distance, device=device), max_distance=distance, sink=sink, scaling=0.2)


def plain_step(q, keys, values, projections, words, mean, inverse_norm, log_u, max_distance, sink, scaling):
    """Static and drawn keys in one softmax, row by row and head by head, in float64."""
    end = sink + words.shape[1]
    ids, counts = kernels.reference_scan(words, kernels.encode_signatures(q, projections), max_distance)
    static = torch.cat([torch.arange(sink), torch.arange(end, keys.shape[1])]).to(q.device)
    output = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    q, keys, values, mean = q.double(), keys.double(), values.double(), mean.double()
    for row in range(q.shape[0]):
        for head in range(q.shape[1]):
            i = torch.cat([static, ids[row, head, : counts[row, head]].long() + sink])
            k = keys[row, i]
            cos = torch.cosine_similarity(k - mean[row], q[row, head][None]).clamp(-1, 1)
            place = (cos + 1) / 2 * (len(log_u) - 1)
            left = place.long().clamp(max=len(log_u) - 2)
            log_weight = torch.lerp(log_u[left].double(), log_u[left + 1].double(), place - left)
            log_weight[: len(static)] = 0
            if len(i):
                output[row, head] = (k @ q[row, head] * scaling - log_weight).softmax(0) @ values[row, i]
    return output, counts


@pytest.mark.parametrize("options", [
    dict(), dict(groups=8, rows=1, dim=64, bits=128, distance=56, dtype="bf16"), dict(sink=0, local=0), dict(sink=0, local=70),
    dict(sink=5, local=0, groups=1), dict(distance=64), dict(distance=0), dict(n=38, sink=4, local=33, groups=4),
    dict(dim=8, bits=256, distance=112, groups=4), dict(n=1400, local=1250, rows=1, groups=2, dim=8)], ids=str)
def test_step(device, options):
    case = step_case(device, **options)
    output, counts = kernels.signature_step(**case)
    wanted, wanted_counts = plain_step(**case)
    assert torch.equal(counts, wanted_counts) and output.dtype == torch.float32
    assert relative_error(output, wanted) < 5e-5


def test_step_that_draws_everything_is_exact_attention(device):
    case = step_case(device, distance=64)
    dense = kernels.dense_reference(case["q"], case["keys"], case["values"], 0.2)
    assert relative_error(kernels.signature_step(**case)[0], dense) < 1e-4


def test_same_input_same_bits(device):
    case = step_case(device)
    runs = [kernels.signature_step(**case) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_key_equal_to_the_mean(device):
    keys = randn(1, 5, 8, device=device)
    keys[:] = keys[:, :1]
    words, mean, inverse_norm = kernels.index_keys(keys, randn(8, 64, device=device))
    assert inverse_norm.isfinite().all() and words.shape == (1, 5, 1) and torch.allclose(mean, keys[:, 0])


# ---- what is refused ----


def encode(*shape, columns, **kinds):
    """A call of encode_signatures, or with num_bits of encode_codes, on x of this shape and that many projections."""
    def call(device, draw, step):
        x, r = randn(*shape, device=device), randn(shape[-1], columns, device=device)
        kernels.encode_codes(x, r, **kinds) if kinds else kernels.encode_signatures(x, r)
    return call


def scan(distance, words=lambda x: x, queries=lambda x: x):
    def call(device, draw, step):
        x = random_words(1, 5, 1, device=device)
        kernels.scan_signatures(words(x), queries(x[:, :2]), distance)
    return call


def attend(**changes):
    """A call of sampled_attention with one argument changed by a function of it."""
    return lambda device, draw, step: kernels.sampled_attention(**draw | {k: f(draw[k]) for k, f in changes.items()})


WRONG = {
    "d 12": (encode(3, 12, columns=64), "x has .*12.*multiple of 8"),
    "100 bits": (encode(3, 8, columns=100), "projections has 100.*multiple of 64"),
    "17 bits": (encode(3, 8, columns=34, num_bits=17), r"num_bits=17 must lie in 1\.\.16"),
    "odd columns": (encode(3, 8, columns=34, num_bits=10), "projections has 34 columns.*num_tables"),
    "integers": (lambda device, draw, step: kernels.encode_codes(draw["ids"], randn(40, 10, device=device), 10), "x is of torch.int32"),
    "strided x": (lambda device, draw, step: kernels.encode_signatures(draw["keys"].mT, randn(40, 64, device=device)),
                  r"Pass x.contiguous\(\)"),
    "far": (scan(65), r"max_distance=65 must lie in 0\.\.64"),
    "words int32": (scan(6, words=torch.Tensor.int), r"words is \(1, 5, 1\) of torch.int32.*encode_signatures"),
    "other bits": (scan(6, queries=lambda x: x.repeat(1, 1, 2)), r"query_words is \(1, 2, 2\)"),
    "ids int64": (attend(ids=torch.Tensor.long), "ids is .*int64.*scan_signatures"),
    "counts": (attend(counts=lambda x: x[:1]), r"counts is \(1, 3\)"),
    "float64 keys": (attend(keys=torch.Tensor.double), "keys is .*float64.*bfloat16"),
    "values": (attend(values=lambda x: x[:, 1:]), r"values is \(2, 39, 16\)"),
    "strided keys": (attend(keys=lambda x: x.mT.contiguous().mT), r"Pass keys.contiguous\(\)"),
    "elsewhere": (attend(mean=lambda x: x.to("meta")), "mean is on meta, q is on"),
    "short table": (attend(log_u=lambda x: x[:1]), "log_u has 1 entries.*signature_log_u"),
    "sink": (lambda device, draw, step: kernels.signature_step(**step | {"sink": 90}),
             "sink=90 and 103 indexed keys reach to 193.*Crop words"),
    "table": (lambda device, draw, step: kernels.signature_log_u(64, 65), "max_distance=65 must lie in"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused_by_name(device, name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call(device, drawn_case(device, 2, 3, 40, 16), step_case(device))


def test_gradients_are_refused(device):
    case = drawn_case(device, 1, 1, 9, 8)
    with pytest.raises(RuntimeError, match="q.requires_grad=True.*no_grad"):
        kernels.sampled_attention(**dict(case, q=case["q"].requires_grad_()))
    with torch.no_grad():
        kernels.sampled_attention(**case)


def test_the_cpu_needs_the_interpreter(device, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="the tensors are on cpu. Move them.*TRITON_INTERPRET=1"):
        kernels.encode_signatures(torch.randn(3, 8), torch.randn(8, 64))


# ---- benchmark and compiler ----


def test_benchmark_runs_on_a_toy(device):
    table = kernels.gpu_benchmark(contexts=(128,), heads=1, groups=2, head_dim=16, num_bits=64, share=0.2, num_layers=1,
                                  local=16, repeats=1, copy_bytes=2**16, write=False)
    assert 0.05 < table[0]["share"] < 0.5 and table[0]["error"] < 2 and table[0]["signatures_us"] > 0


COMPILE = """
import pathlib, sys, types
import paperbook
package = types.ModuleType("paperbook.magicpig")  # without its __init__: this needs no transformers
package.__path__ = [str(pathlib.Path(paperbook.__path__[0]) / "magicpig")]
sys.modules["paperbook.magicpig"] = package
import paperbook.magicpig.triton as kernels, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SIZES = {"_encode_kernel": dict(BITS=64, WIDTH=64, ROWS=16, CHUNK=32), "_hits_kernel": dict(GROUPS=4, WORDS=4, KEYS=256),
         "_write_ids_kernel": dict(KEYS=256), "_sampled_kernel": dict(DIM=128, KEYS=32),
         "_exact_kernel": dict(DIM=128, KEYS=32), "_merge_kernel": dict(DIM=128, SLOTS=32)}
TYPES = {"x": "bf16", "q": "bf16", "k": "bf16", "v": "bf16", "out": "i64", "words": "i64", "query": "i64", "hits": "i8",
         "counts": "i32", "ends": "i32", "ids": "i32"}
for name, sizes in SIZES.items():
    kernel, kinds = getattr(kernels, name), {}
    for argument in kernel.arg_names:
        pointer = "*" + TYPES.get(argument.removesuffix("_ptr"), "fp32")
        plain = "fp32" if argument == "scaling" else "i32"
        kinds[argument] = "constexpr" if argument in sizes else pointer if argument.endswith("_ptr") else plain
    source = ASTSource(fn=kernel, signature=kinds, constexprs=sizes)
    print(name, len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]))
"""


def test_every_kernel_compiles_for_hopper(device, tmp_path):
    """The interpreter accepts what the compiler may not; the compiler needs no GPU, only a process that did not choose."""
    if device == "cuda":
        pytest.skip("every other test for cuda compiles")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("_")]) == 6


def test_cuda_graph_replays_the_step(device):
    if device == "cpu":
        pytest.skip("needs a CUDA graph")
    case = step_case(device, rows=8, groups=4, n=5000, dim=128, bits=256, distance=116, local=64, dtype="bf16")
    wanted = [part.clone() for part in kernels.signature_step(**case)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = kernels.signature_step(**case)
    for part in captured:
        part.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, wanted, strict=True))
    assert relative_error(captured[0], plain_step(**case)[0]) < 1e-4
