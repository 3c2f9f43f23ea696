"""Q-GaLore's wrong input, its rare paths, and what needs a process or a device of its own."""

import copy
import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from paperbook.core.kernels import BackendUnavailable
from paperbook.q_galore import (
    Int8Linear,
    QGaLoreAdamW,
    QGaLoreConfig,
    dequantize_,
    fused_backward,
    leading_basis,
    memory_report,
    qgalore_param_groups,
    quantize_weights_,
)
from paperbook.q_galore.kernels import adam8, new_state8, update_int8_
from paperbook.q_galore.projection import LazySchedule, Projector
from paperbook.q_galore.quantize import Quantized, noise_key, quantize, uniform_noise


class Net(nn.Module):
    """Embedding, two projected layers with biases, a tied head."""

    def __init__(self, tied=True):
        super().__init__()
        self.embed = nn.Embedding(40, 24)
        self.mlp = nn.Sequential(nn.Linear(24, 56), nn.GELU(), nn.Linear(56, 24))
        self.head = nn.Linear(24, 40, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mlp(self.embed(ids)))

    def loss(self, ids):
        return nn.functional.cross_entropy(self(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def net(tied=True, **changes):
    torch.manual_seed(0)
    return quantize_weights_(Net(tied), QGaLoreConfig(**dict(rank=6, update_interval=3) | changes))


def ids(step=0):
    return torch.randint(40, (4, 9), generator=torch.Generator().manual_seed(step))


def train(model, optimizer, steps=5):
    for step in range(steps):
        model.loss(ids(step)).backward()
        optimizer.step()
        optimizer.zero_grad()


# -- properties ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(count=st.integers(0, 700), bits=st.sampled_from([4, 8]), group_size=st.sampled_from([2, 64, 256]), seed=st.integers(0, 99),
       shift=st.sampled_from([-3.0, 0.0, 1e-3, 5.0]), size=st.sampled_from([1e-20, 1e-3, 1.0, 1e20]))
def test_nothing_is_further_than_half_a_step_from_its_code(count, bits, group_size, seed, shift, size):
    x = (torch.randn(count, generator=torch.Generator().manual_seed(seed)) + shift) * size
    q = quantize(x, bits, group_size)
    steps = q.scale.double().repeat_interleave(group_size)[:count]
    assert q.dequantize().shape == x.shape
    assert ((q.dequantize().double() - x.double()).abs() <= steps * 0.501).all()


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 70), n=st.integers(1, 300), rank=st.integers(1, 9), group_size=st.sampled_from([16, 64, 256]), seed=st.integers(0, 99))
def test_numba_rounds_as_torch_does(m, n, rank, group_size, seed):
    generator = torch.Generator().manual_seed(seed)
    rank, right = min(rank, m, n), m >= n
    first = quantize(torch.randn(m, n, generator=generator), 8, group_size)
    second = Quantized(first.codes.clone(), first.scale.clone(), first.zero.clone(), first.shape, 8)
    P, N = torch.randn(min(m, n), rank, generator=generator), torch.randn((m, rank) if right else (rank, n), generator=generator)
    for weight, backend in ((first, "torch"), (second, "numba")):
        update_int8_(weight, N, P, right, 0.05, 0.99, noise_key(seed, 0, 1), backend)
    # A product summed in another order may move a number over a rounding edge, never by more than a step: a code, or a zero point.
    same = first.zero == second.zero
    torch.testing.assert_close(first.scale[same], second.scale[same], rtol=1e-4, atol=0)
    torch.testing.assert_close(first.scale, second.scale, rtol=0.02, atol=0)
    assert (~same).float().mean() < 0.01 + 2 / len(same)
    assert ((first.dequantize() - second.dequantize()).abs() <= 1.01 * first.scale.repeat_interleave(group_size)[: m * n].view(m, n) + 1e-6).all()
    assert (first.codes != second.codes).float().mean() < 0.01 + 2 / first.codes.numel()


def test_noise_depends_on_position_alone():
    key = noise_key(1, 2, 3)
    assert torch.equal(uniform_noise(key, 100)[40:], uniform_noise(key, 60, start=40))
    assert uniform_noise(key, 10_000).min() >= 0 and uniform_noise(key, 10_000).max() < 1


def test_both_ends_of_a_group_are_on_its_grid():
    for x in (torch.tensor([1.0, 0.5, -1e-3, 0.2]), torch.tensor([-1.0, -0.5, 1e-3, -0.2])):
        q = quantize(x, 8, 4)
        low, high = -q.zero.float() * q.scale, (255 - q.zero.float()) * q.scale
        assert low <= x.min() + 1e-7 and high >= x.max() - 1e-7


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_second_moment_is_never_rounded_to_zero(backend):
    g = torch.ones(256)
    g[7], state = 1e-3, new_state8(g)
    for step in range(1, 9):
        update = adam8(state, torch.where(g < 1, 0.0, g) if step > 1 else g, step, backend=backend)
        assert update.abs().max() < 1.2


def test_subspaces_are_looked_at_when_they_are_due():
    model = net(similarity=None)
    train(model, QGaLoreAdamW(model.parameters()), 7)
    assert [model.mlp[i].projector.refreshes for i in (0, 2)] == [3, 3]  # before steps 0, 3 and 6


def test_a_cast_leaves_the_scales_alone():
    model, cast = net(), net().to(torch.float16).float()
    assert torch.equal(model.mlp[0].scale, cast.mlp[0].scale) and cast.mlp[0].scale.dtype == torch.float32


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 9), m=st.integers(2, 40), n=st.integers(2, 40), rank=st.integers(1, 9), solver=st.sampled_from(["svd", "subspace"]), seed=st.integers(0, 99))
def test_the_factors_of_a_gradient_give_its_projection(tokens, m, n, rank, solver, seed):
    generator = torch.Generator().manual_seed(seed)
    g, x = torch.randn(tokens, m, generator=generator), torch.randn(tokens, n, generator=generator)
    projector = Projector((m, n), QGaLoreConfig(rank=min(rank, m, n), solver=solver))
    assert torch.equal(projector.down_product(g, x), projector.down(g.T @ x))  # nothing was looked at yet
    projector.refresh(g.T @ x, 0)
    wanted = projector.down(g.double().T @ x.double())
    assert (projector.down_product(g, x) - wanted).abs().max() <= 1e-4 * max(1, wanted.abs().max())


# -- wrong input -----------------------------------------------------------------------------------------------------


def wrong_inputs():
    plain, optimizer = Net(), QGaLoreAdamW((model := net()).parameters())
    optimizer.kept = model
    return {
        "rank too large": (lambda: quantize_weights_(Net(), QGaLoreConfig(rank=25)), ["rank=25", "mlp.0", "24"]),
        "no match": (lambda: quantize_weights_(Net(), target_modules="attention"), ["attention", "mlp.0", "head"]),
        "tied head": (lambda: quantize_weights_(Net(), QGaLoreConfig(rank=4), "head"), ["head", "embed.weight", "shared"]),
        "frozen": (lambda: quantize_weights_(Net().requires_grad_(False), QGaLoreConfig(rank=4)), ["mlp.0", "frozen"]),
        "nothing to quantize": (lambda: quantize_weights_(Net(), QGaLoreConfig(weight_bits=None)), ["weight_bits=None"]),
        "nothing to dequantize": (lambda: dequantize_(Net()), ["Net", "Int8Linear"]),
        "nothing projected": (lambda: QGaLoreAdamW(plain.parameters()), ["projected", "quantize_weights_"]),
        "groups of a plain model": (lambda: qgalore_param_groups(plain, QGaLoreConfig(rank=4)), ["weight_bits=8", "quantize_weights_"]),
        "accumulation": (lambda: fused_backward(optimizer, accumulation_steps=2).__enter__(), ["accumulation_steps=2", "accumulate"]),
        "clipping": (lambda: fused_backward(optimizer, max_grad_norm=1.0).__enter__(), ["max_grad_norm=1.0", "QGaLoreAdamW(max_grad_norm"]),
        "bits": (lambda: quantize(torch.ones(4), bits=2), ["bits=2", "4 or 8"]),
        "group": (lambda: QGaLoreConfig(group_size=3), ["group_size=3", "even"]),
        "interval": (lambda: QGaLoreConfig(update_interval=0), ["update_interval=0"]),
        "similarity": (lambda: QGaLoreConfig(similarity="cosine"), ["similarity='cosine'", "'top1'"]),
        "scale": (lambda: QGaLoreConfig(scale=0), ["scale=0"]),
        "basis": (lambda: leading_basis(torch.randn(3, 5), 4), ["rank=4", "1..3"]),
        "betas": (lambda: QGaLoreAdamW(net().parameters(), betas=(1.0, 0.9)), ["betas=(1.0, 0.9)"]),
        "report": (lambda: memory_report(Net(), seq_len=4), ["batch_size=None", "seq_len=4"]),
        "report's rank": (lambda: memory_report(Net(), QGaLoreConfig(rank=25)), ["rank=25", "24"]),
        "report's size": (lambda: memory_report(net(), batch_size=-1, seq_len=4), ["batch_size=-1"]),
        "report of no transformer": (lambda: memory_report(net(), batch_size=1, seq_len=4), ["hidden_size", "batch_size"]),
        "eps": (lambda: QGaLoreAdamW(net().parameters(), eps=0), ["eps=0"]),
        "lr": (lambda: QGaLoreAdamW(net().parameters(), lr=math.inf), ["lr=inf"]),
        "one beta": (lambda: QGaLoreAdamW(net().parameters(), betas=(0.9,)), ["betas=(0.9,)"]),
        "a group's states": (lambda: QGaLoreAdamW([{"params": list(net().parameters()), "states": "8-bit"}]), ["states='8-bit'"]),
        "float16": (lambda: QGaLoreAdamW(net().half().parameters()), ["float16", "bfloat16"]),
        "threshold": (lambda: QGaLoreConfig(threshold=math.nan), ["threshold=nan"]),
        "scale as text": (lambda: QGaLoreConfig(scale="0.25"), ["scale='0.25'"]),
        "rounding": (lambda: QGaLoreConfig(stochastic_rounding="no"), ["stochastic_rounding='no'"]),
        "pattern": (lambda: quantize_weights_(Net(), QGaLoreConfig(rank=4), "mlp("), ["mlp(", "regular expression"]),
        "long side first": (lambda: leading_basis(torch.randn(5, 3), 2), ["(5, 3)", "transpose"]),
        "NaN weights": (lambda: quantize_weights_(with_nan(), QGaLoreConfig(rank=4)), ["mlp.2", "NaN"]),
    }


def with_nan():
    model = Net()
    model.mlp[2].weight.data[0, 0] = math.nan
    return model


@pytest.mark.parametrize("name", wrong_inputs())
def test_wrong_input_is_named(name):
    call, words = wrong_inputs()[name]
    with pytest.raises(ValueError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_nothing_is_changed_when_quantizing_is_refused():
    model = Net()
    with pytest.raises(ValueError):
        quantize_weights_(model, QGaLoreConfig(rank=25))
    with pytest.raises(TypeError, match="QGaLoreConfig\\(rank=64\\)"):
        quantize_weights_(model, 64)
    broken = with_nan()
    with pytest.raises(ValueError, match="NaN"):
        quantize_weights_(broken, QGaLoreConfig(rank=4))
    assert not any(isinstance(module, Int8Linear) for some in (model, broken) for module in some.modules())


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="AdamW"):
        fused_backward(torch.optim.AdamW(Net().parameters())).__enter__()
    with pytest.raises(TypeError, match="int64"):
        net().mlp[0](torch.ones(3, 24, dtype=torch.long))


def test_a_tiny_learning_rate_is_warned_of():
    model = net()
    with pytest.warns(UserWarning, match="lr \\* scale"):
        QGaLoreAdamW(model.parameters(), lr=1e-6)


def test_triton_is_refused_on_the_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="triton"):
        update_int8_(quantize(torch.ones(16, 256)), torch.ones(16, 256), backend="triton")


# -- what must not be lost -------------------------------------------------------------------------------------------


def test_nan_changes_nothing_and_is_named():
    model = net()
    optimizer = QGaLoreAdamW(model.parameters())
    train(model, optimizer, 2)
    before = copy.deepcopy(model.state_dict())
    model.loss(ids()).backward()
    model.embed.weight.grad[3, 3] = math.inf
    with pytest.raises(FloatingPointError, match=r"shape \(40, 24\)"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_nan_loss_leaves_the_subspace_as_it_was():
    model = net(update_interval=1)
    optimizer = QGaLoreAdamW(model.parameters())
    train(model, optimizer, 2)
    projector = model.mlp[0].projector
    basis = projector.matrix().clone()
    (model.loss(ids()) * math.nan).backward()
    with pytest.raises(FloatingPointError, match="mlp.0"):
        optimizer.step()
    assert torch.equal(projector.matrix(), basis)


def test_a_grad_scaler_skips_an_overflow():
    model = net()
    optimizer, scaler = QGaLoreAdamW(model.parameters()), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(model.loss(ids()) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()) and scaler.get_scale() == 2.0
    optimizer.zero_grad()
    scaler.scale(model.loss(ids())).backward()
    scaler.step(optimizer)
    assert not torch.equal(model.mlp[0].qweight, before["mlp.0.qweight"])


def test_the_first_layer_learns_behind_a_frozen_embedding():
    model = net()
    model.embed.weight.requires_grad_(False)
    optimizer, before = QGaLoreAdamW(p for p in model.parameters() if p.requires_grad), model.mlp[0].qweight.clone()
    train(model, optimizer, 2)
    assert not torch.equal(model.mlp[0].qweight, before)


def test_svd_that_does_not_converge_is_retried(monkeypatch):
    A, real = torch.randn(8, 20), torch.linalg.svd
    wanted = real(A)[0][:, :3]

    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", fails)
    found = leading_basis(A, 3, "svd")
    torch.testing.assert_close((found.T @ wanted).abs(), torch.eye(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("solver", ["subspace", "svd", "randomized"])
def test_a_zero_gradient_is_not_looked_at(solver):
    projector = Projector((12, 7), QGaLoreConfig(rank=3, solver=solver, projection_bits=None))
    projector.refresh(torch.zeros(12, 7), 0)
    assert projector.basis is None and projector.due(1) and not projector.down(torch.zeros(12, 7)).any()
    projector.refresh(torch.randn(12, 7), 1)
    torch.testing.assert_close(projector.matrix().T @ projector.matrix(), torch.eye(3), atol=1e-5, rtol=0)


def test_randomized_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    leading_basis(torch.randn(8, 9, generator=torch.Generator().manual_seed(0)), 2, "randomized")
    assert torch.equal(torch.rand(2), wanted)


def test_a_pickled_model_trains_on():
    model = net()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for m in (model, loaded, copy.deepcopy(model)):
        optimizer = QGaLoreAdamW(m.parameters())
        train(m, optimizer, 3)
        assert torch.equal(m.mlp[0].qweight, model.mlp[0].qweight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_parameters_are_stepped_in_pieces(monkeypatch, dtype):
    from paperbook.q_galore import optimizer as module

    whole, pieces = net(tied=False), net(tied=False)
    for model in (whole, pieces):
        model.table = nn.Parameter(torch.linspace(-1, 1, 5000).to(dtype))
    for model, piece in ((whole, 1 << 20), (pieces, 512)):
        monkeypatch.setattr(module, "PIECE", piece)
        optimizer = QGaLoreAdamW(model.parameters(), weight_decay=0.1)
        for step in range(4):
            (model.loss(ids(step)) + (model.table * torch.arange(5000)).sin().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(whole.table, pieces.table)


def test_bfloat16_parameters_keep_small_updates():
    model = net(tied=False).to(torch.bfloat16)
    model.table = nn.Parameter(torch.ones(100_000, dtype=torch.bfloat16))
    optimizer = QGaLoreAdamW([{"params": [model.mlp[0].projected]}, {"params": [model.table]}], lr=1e-4)
    for _ in range(20):
        model.table.grad = torch.ones_like(model.table)
        optimizer.step()
    assert abs(model.table.float().mean().item() - (1 - 20e-4)) < 1e-4, "half a last digit of bfloat16 is forty such steps"


def test_matrices_are_clipped_one_by_one():
    free, loose, clipped = net(), net(), net()
    for model, norm in ((free, None), (loose, 1e6), (clipped, 1e-3)):
        optimizer = QGaLoreAdamW(model.parameters(), max_grad_norm=norm, states="32bit")
        model.loss(ids()).backward()
        optimizer.step()
        largest = max(state["exp_avg"].norm().item() for state in optimizer.state.values())
        assert (largest <= 1.01e-4) == (norm == 1e-3)
    assert torch.equal(free.mlp[0].qweight, loose.mlp[0].qweight)


def test_fsdp_is_refused_by_name(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = net(tied=False)
        model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.detach(), init_device_mesh("cpu", (1,)), [Replicate()]))
        optimizer = QGaLoreAdamW(model.parameters())
        model.head.weight.grad = model.head.weight.detach().clone()
        with pytest.raises(NotImplementedError, match="FSDP2"):
            optimizer.step()
    finally:
        dist.destroy_process_group()


def test_fused_backward_is_refused_on_several_ranks(monkeypatch):
    model = net()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(NotImplementedError, match="several ranks"):
        fused_backward(QGaLoreAdamW(model.parameters())).__enter__()


def test_an_optimizer_says_when_its_model_is_gone():
    model = net()
    parameters = list(model.parameters())
    del model
    import gc

    gc.collect()
    with pytest.raises(RuntimeError, match="no longer exists"):
        QGaLoreAdamW(parameters)


def test_a_foreign_checkpoint_is_refused():
    model, other = net(), net()
    optimizer = QGaLoreAdamW(model.parameters())
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    for index in saved["state"]:
        saved["state"][index].pop("projector", None)
    with pytest.raises(ValueError, match="holds no projector for mlp"):
        QGaLoreAdamW(other.parameters()).load_state_dict(saved)


# -- what a stranger would do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_another_optimizer_is_refused(options):
    model = net()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), **options)
    model.loss(ids()).backward()
    with pytest.raises(TypeError, match="AdamW cannot train Int8Linear"):
        optimizer.step()


def test_subclasses_of_linear_are_left_alone():
    layer = nn.TransformerEncoderLayer(16, 2, 32)
    with pytest.raises(ValueError, match="linear1"):
        quantize_weights_(layer, QGaLoreConfig(rank=4), "attn")  # out_proj's weight is read past its forward


def test_moments_of_another_shape_or_kind_are_refused():
    model, other = net(), net()
    optimizer = QGaLoreAdamW(model.parameters())
    train(model, optimizer, 1)
    with pytest.raises(ValueError, match="moments"):
        QGaLoreAdamW(other.parameters(), states="32bit").load_state_dict(optimizer.state_dict())
    wide = Net()
    wide.mlp = nn.Sequential(nn.Linear(24, 88), nn.GELU(), nn.Linear(88, 24))
    quantize_weights_(wide, QGaLoreConfig(rank=6, update_interval=3))
    with pytest.raises(ValueError, match="checkpoint"):
        QGaLoreAdamW(wide.parameters()).load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="update_interval=3"):
        QGaLoreAdamW((last := net(update_interval=5)).parameters()).load_state_dict(optimizer.state_dict())
    assert last.mlp[0].projector.basis is None


def test_an_optimizer_of_layers_that_were_replaced_says_so():
    model = net()
    optimizer = QGaLoreAdamW(model.parameters())
    dequantize_(model)
    model.loss(ids()).backward()
    with pytest.raises(RuntimeError):
        optimizer.step()


def test_backward_after_a_step_is_refused():
    model = net()
    optimizer, loss = QGaLoreAdamW(model.parameters()), model.loss(ids())
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="took a step|inplace"):
        loss.backward()


def test_directions_without_gradient_are_left_empty():
    A = torch.randn(64, 5) @ torch.randn(5, 40)
    for solver in ("subspace", "svd"):
        projector = Projector((64, 40), QGaLoreConfig(rank=12, solver=solver))
        projector.refresh(A, 0)
        assert (projector.matrix().abs().amax(0) > 0).sum() == 5
        projector.refresh(torch.randn(64, 40), 200)
        assert (projector.matrix().abs().amax(0) > 0).all()


def test_a_zero_first_gradient_changes_nothing():
    model = net()
    optimizer, before = QGaLoreAdamW(model.parameters()), model.mlp[0].weight
    (model.loss(ids()) * 0).backward()
    optimizer.step()
    # Ranges are found anew, and a weight that they have moved off the grid by a rounding error may be rounded again.
    moved = (model.mlp[0].weight - before).abs() / model.mlp[0].scale.repeat_interleave(256)[: before.numel()].view(before.shape)
    assert model.mlp[0].projector.basis is None and moved.max() <= 1.01 and (moved > 0.01).float().mean() < 0.01


def test_float_weights_in_bfloat16_keep_small_updates():
    travelled = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = Net().to(dtype)
        optimizer = QGaLoreAdamW(qgalore_param_groups(model, QGaLoreConfig(rank=6, weight_bits=None)), lr=1e-3)
        start = model.mlp[0].weight.detach().float().clone()
        train(model, optimizer, 40)
        travelled[dtype] = (model.mlp[0].weight.detach().float() - start).norm().item()
    assert travelled[torch.bfloat16] > 0.7 * travelled[torch.float32]


def test_equal_parameters_do_not_share_their_noise():
    model = net(tied=False)
    model.pair = nn.ParameterList([nn.Parameter(torch.ones(5000, dtype=torch.bfloat16)) for _ in range(2)])
    optimizer = QGaLoreAdamW(model.parameters(), lr=1e-4)
    for p in model.pair:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(*model.pair)


def test_a_folder_of_codes_is_read_and_a_plain_one_is_not_marked(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = quantize_weights_(LlamaForCausalLM(config), QGaLoreConfig(rank=4))
    model.save_pretrained(tmp_path / "codes")
    assert '"quant_method": "q_galore"' in (tmp_path / "codes" / "config.json").read_text()
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "codes")
    assert all(torch.equal(p, q) for p, q in zip(read.state_dict().values(), model.state_dict().values(), strict=True))
    optimizer = QGaLoreAdamW(read.parameters(), lr=1e-2)
    for row in range(3):
        read(ids(row), labels=ids(row)).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    read.save_pretrained(tmp_path / "further")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "further").eval()(ids()).logits, read.eval()(ids()).logits)
    dequantize_(model).save_pretrained(tmp_path / "plain")
    assert "q_galore" not in (tmp_path / "plain" / "config.json").read_text()
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(ids()).logits, model(ids()).logits)


def test_a_copy_of_a_frozen_model_is_frozen():
    model = net()
    for p in model.parameters():
        p.requires_grad_(False)
    assert not any(p.requires_grad for p in copy.deepcopy(model).parameters())


def test_a_single_vector_has_a_gradient():
    model = net()
    model.mlp(torch.randn(24)).sum().backward()
    assert model.mlp[0].projected.grad.shape == (56, 6)


def test_fused_backward_does_not_nest():
    model = net()
    optimizer = QGaLoreAdamW(model.parameters())
    with fused_backward(optimizer), pytest.raises(RuntimeError, match="already"):
        fused_backward(optimizer).__enter__()
    with fused_backward(optimizer):
        model.loss(ids()).backward()


def test_frozen_parameters_have_no_states_in_the_report():
    free, frozen = Net(tied=False), Net(tied=False)
    frozen.embed.weight.requires_grad_(False)
    difference = memory_report(free, QGaLoreConfig(rank=4)).total - memory_report(frozen, QGaLoreConfig(rank=4)).total
    assert difference == 8 * 24 * 40


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("m, n, rank", [(64, 512, 16), (300, 256, 33), (77, 91, 5)])
def test_triton_rounds_as_torch_does_on_cuda(m, n, rank):
    right = m >= n
    first = quantize(torch.randn(m, n, device="cuda"))
    second = Quantized(first.codes.clone(), first.scale.clone(), first.zero.clone(), first.shape, 8)
    P, N = torch.randn(min(m, n), rank, device="cuda"), torch.randn((m, rank) if right else (rank, n), device="cuda")
    for weight, backend in ((first, "torch"), (second, "triton")):
        update_int8_(weight, N, P, right, 0.01, 1.0, noise_key(0, 0, 1), backend)
    assert (first.codes != second.codes).float().mean() < 0.02
    assert ((first.dequantize() - second.dequantize()).abs() <= 1.05 * first.scale.repeat_interleave(256)[: m * n].view(m, n)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_on_cuda(dtype):
    model = net().to("cuda", dtype)
    optimizer, losses = QGaLoreAdamW(model.parameters(), lr=2e-2), []
    for _ in range(30):
        with fused_backward(optimizer):
            loss = model.loss(ids().cuda())
            loss.backward()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1


@pytest.mark.gpu
def test_states_on_cuda_are_those_of_the_cpu():
    g = torch.randn(1000)
    here, there = new_state8(g), new_state8(g.cuda())
    torch.testing.assert_close(adam8(here, g, 1), adam8(there, g.cuda(), 1).cpu(), rtol=1e-2, atol=1e-2)


def test_a_layer_without_gradient_does_not_spoil_the_checkpoint():
    model = net()
    optimizer = QGaLoreAdamW(model.parameters(), lr=1e-2)
    for step in range(2):  # the second layer's gradient is zero
        (model.mlp[2](model.mlp[1](model.mlp[0](model.embed(ids(step))))) * 0).sum().backward()
        optimizer.step(), optimizer.zero_grad()
    assert model.mlp[2].projector.basis is None and model.mlp[2].step == 0
    other = net()
    other.load_state_dict(model.state_dict())
    resumed = QGaLoreAdamW(other.parameters(), lr=1e-2)
    other.loss(ids(9)).backward()
    resumed.step(), resumed.zero_grad()  # what it has seen must go
    other.load_state_dict(model.state_dict()), resumed.load_state_dict(optimizer.state_dict())
    train(model, optimizer), train(other, resumed)
    assert model.mlp[2].step == other.mlp[2].step == 5
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_each_layer_is_counted_by_its_own_configuration():
    model = quantize_weights_(quantize_weights_(Net(), QGaLoreConfig(rank=4), "0"), QGaLoreConfig(rank=12), "2")
    apart = [quantize_weights_(Net(), QGaLoreConfig(rank=rank), "mlp") for rank in (4, 12)]
    both, low, high = (memory_report(some).stored["states, projected layers"] for some in (model, *apart))
    assert low < both < high


# -- folders ---------------------------------------------------------------------------------------------------------


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2) | changes))


def test_models_of_one_configuration_do_not_mark_each_other(tmp_path):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    teacher = llama()
    one, two = (quantize_weights_(LlamaForCausalLM(teacher.config), QGaLoreConfig(rank=4)) for _ in range(2))
    assert all(module.config is one.config for module in one.modules() if hasattr(module, "config"))
    teacher.save_pretrained(tmp_path / "teacher")
    dequantize_(one)
    two.save_pretrained(tmp_path / "two")
    for name, model in (("teacher", teacher), ("two", two)):
        read = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert all(torch.equal(p, q) for p, q in zip(read.state_dict().values(), model.state_dict().values(), strict=True))


def test_a_folder_without_codes_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    model = quantize_weights_(llama(), QGaLoreConfig(rank=4))
    model.save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "layers.1.mlp.up_proj.scale" not in name}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="no Int8Linear for model.layers.1.mlp.up_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    LlamaForCausalLM(model.config).save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="no Int8Linear for"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


def test_a_folder_is_read_with_and_without_a_head(tmp_path):
    from transformers import AutoModel, AutoModelForCausalLM, BertModel, LlamaModel

    model = quantize_weights_(llama(), QGaLoreConfig(rank=4)).eval()
    model.save_pretrained(tmp_path / "whole"), model.model.save_pretrained(tmp_path / "base")
    wanted = model.model(ids()).last_hidden_state
    for read in (AutoModel.from_pretrained(tmp_path / "whole"), LlamaModel.from_pretrained(tmp_path / "base"), AutoModelForCausalLM.from_pretrained(tmp_path / "base").model):
        assert torch.equal(read.eval()(ids()).last_hidden_state, wanted)
    with pytest.raises((ValueError, RuntimeError)):
        BertModel.from_pretrained(tmp_path / "whole")


def test_a_second_optimizer_looks_again():
    model = net(update_interval=20)
    train(model, QGaLoreAdamW(model.parameters(), lr=1e-3), 25)
    second, looks = QGaLoreAdamW(model.parameters(), lr=1e-3), []
    assert model.mlp[0].projector.refreshes == 0 and model.mlp[0].projector.basis is None
    for _ in range(45):
        train(model, second, 1)
        looks.append(model.mlp[0].projector.refreshed_at)
    assert sorted(set(looks)) == [0, 20, 40]


@pytest.mark.parametrize("similarity, interval", [(0.41, 20), (0.39, 5)])
def test_the_interval_grows_only_above_the_threshold(similarity, interval):
    schedule, looks = LazySchedule(QGaLoreConfig(update_interval=5, window=2, growth=4)), []
    for step in range(11):
        if schedule.due(step):
            schedule.looked(step, similarity if step else None)
            looks.append(step)
    assert looks == [0, 5, 10] and schedule.interval == interval


def test_a_copied_optimizer_says_so():
    model = net()
    optimizer = QGaLoreAdamW(model.parameters())
    twin, other = copy.deepcopy((model, optimizer))
    twin.loss(ids()).backward()
    with pytest.raises(RuntimeError, match="copied"):
        other.step()


def test_a_nan_inside_a_fused_backward_says_what_has_changed():
    model = net()
    optimizer = QGaLoreAdamW(model.parameters())
    model.mlp[0].register_full_backward_hook(lambda module, grad_in, grad_out: tuple(g * math.nan for g in grad_in))
    with pytest.raises(FloatingPointError, match="has taken this step already"), fused_backward(optimizer):
        model.loss(ids()).backward()


def test_a_new_run_is_not_mixed_with_an_earlier_one(tmp_path):
    from paperbook.q_galore.cli import _last_checkpoint

    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match="--resume"):
        _last_checkpoint(tmp_path, 9, False)
    assert _last_checkpoint(tmp_path, 9, True).endswith("checkpoint-4")


def test_a_gradient_below_the_norm_is_not_blown_up():
    def after(norm):
        model = net()
        train(model, QGaLoreAdamW(model.parameters(), lr=1e-2, max_grad_norm=norm))
        return model.state_dict()

    free, wide, tight = after(None), after(1e9), after(1e-3)
    assert all(torch.equal(free[name], wide[name]) for name in free)
    assert any(not torch.equal(free[name], tight[name]) for name in free)


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_a_small_second_moment_never_becomes_zero(backend):
    g = torch.ones(256)
    g[7] = 3e-4  # a gradient once, small beside its neighbours', then never again
    moments, updates = new_state8(g), []
    for step in range(1, 9):
        updates.append(adam8(moments, g if step == 1 else torch.where(g < 1, 0.0, g), step, backend=backend)[7].abs().item())
    assert max(updates) < 1.2
