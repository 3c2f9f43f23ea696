"""Attention Transfer: the tap on models of two libraries, the loss against autograd, the pair and its wrong inputs."""

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from paperbook.attention_transfer import (
    AttentionTap,
    AttentionTransfer,
    attention_ce,
    loss,
    reproduce,
    student_from_teacher,
)
from paperbook.attention_transfer.cli import Images, app, load_model, open_image, read_folder, split
from paperbook.attention_transfer.compare import Ensemble, attention_jsd, linear_cka
from paperbook.attention_transfer.teacher import fashion_vit, warm_cosine
from paperbook.attention_transfer.transfer import MODES


def vit(**options):
    torch.manual_seed(options.pop("seed", 0))
    model = timm.create_model("vit_tiny_patch16_224", **dict(img_size=64, depth=3, num_classes=5) | options).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


def images(count=2, seed=1):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def calls(model, x):
    with torch.no_grad(), AttentionTap(model) as tap:
        model(x)
    return tap.calls


sides = st.integers(1, 40)


@settings(max_examples=80, deadline=None)
@given(batch=st.integers(1, 3), heads=st.integers(1, 3), queries=sides, keys=sides, widths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
       piece=st.sampled_from([1, 50, 700, 2**18]), mask=st.sampled_from(["none", "bias", "bool"]), double=st.booleans(), seed=st.integers(0, 99))
def test_the_loss_is_what_autograd_makes_of_the_maps(batch, heads, queries, keys, widths, piece, mask, double, seed):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q_t, k_t, q_s, k_s = (random(batch, heads, n, width) for width in widths for n in (queries, keys))
    masks = {}
    if mask == "bias":
        masks = {"mask_t": random(heads, queries, keys), "mask_s": random(1, 1, queries, keys)}
    elif mask == "bool":
        allowed = torch.rand(batch, 1, queries, keys, generator=generator) < 0.7
        allowed[..., 0] = True
        masks = {"mask_t": allowed, "mask_s": allowed}

    def scores(q, k, scale, bias):
        S = scale * q @ k.mT
        return S if bias is None else S.masked_fill(~bias, -1e300) if bias.dtype == torch.bool else S + bias

    q_s, k_s = q_s.requires_grad_(), k_s.requires_grad_()
    P = scores(q_t, k_t, 0.4, masks.get("mask_t")).softmax(-1)
    known = -(P * scores(q_s, k_s, widths[1] ** -0.5, masks.get("mask_s")).log_softmax(-1)).sum(-1).mean()
    wanted = torch.autograd.grad(known, (q_s, k_s))
    dtype = torch.float64 if double else torch.float32
    own = [part.detach().to(dtype).requires_grad_() for part in (q_s, k_s)]
    before, loss.PIECE = loss.PIECE, piece
    try:
        found = attention_ce(q_t.to(dtype), k_t.to(dtype), *own, scale_t=0.4, **{name: part if part.dtype == torch.bool else part.to(dtype) for name, part in masks.items()})
    finally:
        loss.PIECE = before
    eps = 1e-10 if double else 1e-4
    assert abs(found.item() - known.item()) < eps * max(1, known.item())
    for a, b in zip(torch.autograd.grad(found, own), wanted, strict=True):
        assert (a - b).norm() <= eps * max(1, b.norm())


def test_nothing_reaches_the_teacher_and_there_is_no_second_derivative():
    q, k, p = (torch.randn(1, 1, 5, 4, requires_grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(attention_ce(q, k, p, k.detach()), p, create_graph=True)
    assert attention_ce(q, k, p, k).grad_fn is not None
    attention_ce(q, q, p, k).backward()
    assert q.grad is None and p.grad is not None
    with pytest.raises(RuntimeError, match="does not require grad"):
        grad.sum().backward()


def test_half_precision_is_computed_in_single_and_autocast_changes_nothing():
    parts = [torch.randn(1, 2, 30, 16, generator=torch.Generator().manual_seed(i)) * 3 for i in range(4)]
    half = [part.bfloat16() for part in parts]
    single = attention_ce(*(part.float() for part in half))
    assert attention_ce(*half).dtype == torch.float32 and torch.equal(attention_ce(*half), single)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_ce(*(part.float() for part in half)), single)


def test_an_error_inside_leaves_no_hook_and_the_tap_serves_again():
    model = vit()
    tap = AttentionTap(model)
    with pytest.raises(ZeroDivisionError), tap:
        model(images())
        raise ZeroDivisionError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with tap:
        model(images())
    assert [call.name for call in tap.calls] == [f"blocks.{i}.attn" for i in range(3)]


def test_what_runs_outside_of_the_model_is_not_seen():
    model, q = vit(), torch.randn(1, 2, 5, 4)
    with AttentionTap(model) as tap:
        F.scaled_dot_product_attention(q, q, q)
        model(images())
        q.softmax(-1)
    assert len(tap.calls) == 3


def test_a_compiled_model_is_refused_however_it_was_compiled():
    model = vit()
    with pytest.raises(RuntimeError, match="compiled"), AttentionTap(torch.compile(model)):
        pass
    model.compile()
    with pytest.raises(RuntimeError, match="compiled"), AttentionTap(model):
        pass


def test_recomputed_activations_are_refused_where_there_is_a_gradient():
    model = vit()
    model.set_grad_checkpointing()
    assert len(calls(model, images())) == 3
    with pytest.raises(RuntimeError, match="checkpointing"), AttentionTap(model):
        model(images())


def transformers_models():
    from transformers import BeitConfig, DeiTConfig, Dinov2Config, ViTConfig

    small = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8)
    return [ViTConfig(**small, intermediate_size=40), DeiTConfig(**small, intermediate_size=40),
            BeitConfig(**small, intermediate_size=40, use_relative_position_bias=True), Dinov2Config(**small)]


@pytest.mark.parametrize("config", transformers_models(), ids=lambda config: config.model_type)
@pytest.mark.parametrize("mode", MODES)
def test_a_twin_that_copies_computes_what_it_did(config, mode):
    from transformers import AutoModel

    torch.manual_seed(0)
    teacher, x = AutoModel.from_config(config).eval(), torch.randn(2, 3, 32, 32)
    for p in teacher.parameters():
        p.data += 0.1 * torch.randn_like(p)
    pair = AttentionTransfer(teacher, copy.deepcopy(teacher).requires_grad_(True), mode).eval()
    torch.testing.assert_close(pair(x).logits, teacher(x)[0], rtol=1e-4, atol=1e-5)
    if mode == "distill":
        out = pair.train()(x)
        if not any(isinstance(module, nn.Dropout) and module.p for module in teacher.modules()) and not getattr(config, "drop_path_rate", 0):
            out.attention.backward()
            assert max(p.grad.abs().max() for p in pair.parameters() if p.grad is not None) < 1e-5


def test_eager_and_fused_models_copy_alike():
    from transformers import AutoModel

    torch.manual_seed(0)
    config, x = transformers_models()[0], torch.randn(2, 3, 32, 32)
    models = [AutoModel.from_config(config).eval() for _ in range(2)]
    answers = []
    for implementations in (("sdpa", "sdpa"), ("eager", "eager"), ("sdpa", "eager"), ("eager", "sdpa")):
        for model, implementation in zip(models, implementations, strict=True):
            model.set_attn_implementation(implementation)
        answers.append(AttentionTransfer(*models, "copy").eval()(x).logits)
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="makes its map itself"):
        models[1].set_attn_implementation("eager")
        AttentionTransfer(*models, "copy_v").eval()(x)


def test_layers_are_paired_across_depths_and_the_teacher_stops_early():
    teacher, student, ran = vit(depth=5), vit(depth=2, seed=3), []
    for i, block in enumerate(teacher.blocks):
        block.register_forward_hook(lambda *ignored, i=i: ran.append(i))
    pair = AttentionTransfer(teacher, student, layers={0: 1, -1: 3}).train()
    first = pair(images()).layers
    ran.clear()
    again = pair(images()).layers
    assert ran == [0, 1, 2] and torch.equal(first, again)
    maps, own = calls(teacher, images()), calls(student, images())
    known = [-(maps[t].map() * own[s].map().log()).sum(-1).mean() for s, t in ((0, 1), (1, 3))]
    torch.testing.assert_close(again, torch.stack(known), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES[1:])
def test_only_the_named_heads_are_copied(mode):
    teacher, student = vit(), vit(seed=5)
    part = {"copy_q": "query", "copy_k": "key", "copy_v": "value"}.get(mode)
    theirs = calls(teacher, images())

    def by_hand(i, call):
        mixed = (call.map() if part is None else getattr(call, part)).clone()
        mixed[:, [0, 2]] = (theirs[i].map() if part is None else getattr(theirs[i], part))[:, [0, 2]]
        return replace(call, **{part or "weights": mixed})

    with torch.no_grad(), AttentionTap(student, by_hand):
        known = student(images())
    torch.testing.assert_close(AttentionTransfer(teacher, student, mode, heads=[0, 2]).eval()(images()).logits, known, rtol=1e-4, atol=1e-5)


def test_the_teacher_is_frozen_stays_in_eval_moves_along_and_is_not_saved():
    pair = AttentionTransfer(vit(drop_path_rate=0.2), vit(seed=2))
    assert not pair.train().teacher.training and pair.student.training
    assert not any(p.requires_grad for p in pair.teacher.parameters())
    assert all(name.startswith("student.") for name in pair.state_dict())
    pair.double()
    assert {p.dtype for p in pair.teacher.parameters()} == {torch.float64}
    again = copy.deepcopy(pair)
    again.load_state_dict(pair.state_dict())
    assert torch.equal(again.eval()(images().double()).logits, pair.eval()(images().double()).logits)


def test_every_layer_that_is_distilled_gets_a_gradient_for_queries_and_keys():
    pair = AttentionTransfer(vit(), vit(seed=2), layers=slice(0, 2)).train()
    pair(images()).attention.backward()
    moved = [[bool(part.any()) for part in block.attn.qkv.weight.grad.chunk(3)] if block.attn.qkv.weight.grad is not None else None for block in pair.student.blocks]
    assert moved == [[True, True, True], [True, True, False], None]  # values of the first shape the second's map


def test_a_weight_that_cannot_be_drawn_anew_is_named():
    teacher = vit()
    teacher.blocks[0].own = nn.Parameter(torch.randn(3))
    with pytest.raises(ValueError, match=r"blocks\.0\.own"):
        student_from_teacher(teacher)


def test_a_plain_student_of_a_teacher_with_more_parts_is_warned_of():
    teacher = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=56, depth=1)
    with pytest.warns(UserWarning, match="LayerScale, reg_token.*2605.07191"):
        AttentionTransfer(teacher, vit())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AttentionTransfer(teacher, student_from_teacher(teacher))
    with pytest.warns(UserWarning, match="attn_drop"):
        AttentionTransfer(vit(), vit(attn_drop_rate=0.1), "copy")


@pytest.mark.parametrize(("make", "error", "words"), [
    (lambda: AttentionTransfer(vit(), vit(seed=1), heads=[]), ValueError, "nothing would be transferred"),
    (lambda: AttentionTransfer(vit(), vit(seed=1), weight=float("nan")), ValueError, "weight=nan"),
    (lambda: AttentionTransfer(vit(), vit(seed=1), layers=[])(images()), ValueError, "nothing would be transferred"),
    (lambda: AttentionTransfer(vit(), vit(seed=1), layers=[-4])(images()), ValueError, "names layer -4 of the student"),
    (lambda: AttentionTransfer(vit(), vit(seed=1), heads=[7])(images()), ValueError, "heads=\\[7\\]"),
    (lambda: AttentionTransfer(vit(), vit(depth=2))(images()), ValueError, "layers={student's layer"),
    (lambda: AttentionTransfer(vit(), vit(num_heads=2), "copy")(images()), ValueError, "student_from_teacher"),
    (lambda: AttentionTransfer(vit(), vit(num_heads=2))(images()), ValueError, "3 heads and 2"),
    (lambda: AttentionTransfer(vit(class_token=False, global_pool="avg"), vit())(images()), ValueError, "16 queries and 17"),
    (lambda: AttentionTransfer(timm.create_model("resnet10t"), vit())(images()), RuntimeError, "no attention of ResNet"),
    (lambda: AttentionTransfer(timm.create_model("cait_xxs24_224", img_size=64, depth=1), vit())(images()), NotImplementedError, "TalkingHeadAttn"),
])
def test_what_does_not_fit_is_said(make, error, words):
    with pytest.raises(error, match=words):
        made = make()
        made.train()(images())


@pytest.mark.parametrize(("name", "words"), [("davit_tiny", "ChannelAttention"), ("edgenext_xx_small", "CrossCovarianceAttn"), ("mobilevitv2_050", "LinearSelfAttention"),
                                             ("efficientformerv2_s0", "talking_head2"), ("xcit_nano_12_p16_224", "XCA"), ("volo_d1_224", "OutlookAttention")])
def test_what_is_no_map_between_tokens_is_refused_by_name(name, words):
    model = timm.create_model(name).eval()
    with pytest.raises(NotImplementedError, match=words):
        calls(model, torch.randn(1, *model.default_cfg["input_size"]))


def test_heads_that_share_their_keys_are_served():
    torch.manual_seed(0)
    teacher = timm.create_model("mobilenetv4_hybrid_medium").eval()
    x = torch.randn(1, 3, 128, 128)
    answer = teacher(x)
    with torch.no_grad(), AttentionTap(teacher, lambda i, call: replace(call, weights=call.map())):
        torch.testing.assert_close(teacher(x), answer, rtol=1e-3, atol=1e-4)
    call = calls(teacher, x)[0]
    assert call.key.shape[1] == call.query.shape[1]
    with pytest.raises(ValueError, match="teacher's queries and keys"):
        attention_ce(call.query, call.key[:, :1], call.query, call.key)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_that_set_no_flag_are_refused_too(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = vit()

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=use_reentrant)

    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match="checkpointing"), AttentionTap(Wrapped()) as tap:
        tap.model(x)


def test_a_masked_autoencoder_that_shuffles_is_refused():
    from transformers import ViTConfig, ViTMAEConfig, ViTMAEModel, ViTModel

    small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=64, patch_size=16)
    for ratio in (0.0, 0.5):
        with pytest.raises(ValueError, match="ViTMAEModel sees the same images differently"):
            AttentionTransfer(ViTMAEModel(ViTMAEConfig(**small, mask_ratio=ratio)), ViTModel(ViTConfig(**small))).train()(images(4))


def test_a_drop_path_that_serves_two_branches_drops_each_by_itself():
    from transformers import Dinov2Config, Dinov2ForImageClassification, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8, drop_path_rate=0.5, num_labels=4)
    teacher, student = Dinov2Model(config), Dinov2ForImageClassification(config)
    student.dinov2.load_state_dict(teacher.state_dict())
    pair, seen = AttentionTransfer(teacher, student).train(), []
    student.dinov2.encoder.layer[1].drop_path.register_forward_hook(lambda module, inputs, output: seen.append(output.flatten(1).any(1)) if module.training else None)
    for _ in range(20):
        out = pair(torch.randn(8, 3, 32, 32))
        out.attention.backward()
        assert max(p.grad.abs().max() for p in student.parameters() if p.grad is not None) < 1e-5  # both dropped alike
    dropped = torch.cat(seen).view(20, -1, 8)
    assert (dropped[:, 0] != dropped[:, 1]).any()


def test_a_student_is_drawn_as_its_architecture_draws():
    student = student_from_teacher(vit(), num_classes=10)
    assert student.head.weight.std() < 0.03 and not student.head.bias.any()
    with pytest.raises(ValueError, match="no init_weights"):
        student_from_teacher(timm.create_model("twins_pcpvt_small"))
    scalar = timm.models.vision_transformer.VisionTransformer(img_size=32, embed_dim=16, depth=1, num_heads=2, act_layer=timm.models.metaformer.StarReLU)
    with pytest.raises(ValueError, match=r"mlp\.act\.scale"):
        student_from_teacher(scalar)


def test_two_threads_tap_one_model_without_seeing_each_other():
    from concurrent.futures import ThreadPoolExecutor

    model = vit()
    known = calls(model, images(4))[1].map()
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: calls(model, images(4)), range(12)))
    assert all(len(part) == 3 for part in found)
    for part in found:
        torch.testing.assert_close(part[1].map(), known)


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}])
def test_the_trainer_refuses_what_would_leave_the_attention_loss_out(options, tmp_path):
    from transformers import TrainingArguments

    from paperbook.attention_transfer.trainer import AttentionTransferTrainer

    with pytest.raises(ValueError, match=next(iter(options))):
        AttentionTransferTrainer(AttentionTransfer(vit(), vit(seed=1)), TrainingArguments(tmp_path, use_cpu=True, report_to="none", **options))


def paint(folder, kinds=("dark", "light"), count=8, size=20):
    """A folder of small pictures, one class darker than the other."""
    from PIL import Image

    for k, kind in enumerate(kinds):
        (folder / kind).mkdir(parents=True)
        for i in range(count):
            pixels = (np.random.default_rng(100 * k + i).random((size, size + 4, 3)) * 100 + 100 * k).astype("uint8")
            Image.fromarray(pixels).save(folder / kind / f"{i}.png")
    return folder


def command(*words, code=0):
    result = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "160"})
    assert result.exit_code == code, (result.output[-2000:], result.exception)
    return result.output


def tiny_folder(folder, **options):
    """A transformers ViT with its image processor, as `save_pretrained` leaves them."""
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    config = ViTConfig(**dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8) | options)
    ViTModel(config).save_pretrained(folder)
    ViTImageProcessor(size=dict(height=16, width=16)).save_pretrained(folder)
    return folder


def test_a_folder_is_split_by_class_and_every_image_is_used_once(tmp_path):
    classes, some, others, left = split(paint(tmp_path / "a", count=10), 0.2, 0)
    assert classes == ["dark", "light"] and len(some) == 16 and len(others) == 4
    assert len({path for path, _ in some + others}) == 20 and sorted(label for _, label in others) == [0, 0, 1, 1]
    paint(tmp_path / "b" / "train", count=3), paint(tmp_path / "b" / "val", count=2)
    classes, some, others, left = split(tmp_path / "b", 0.2, 0)
    assert classes == ["dark", "light"] and len(some) == 6 and len(others) == 4 and all(path.parts[-3] == "val" for path, _ in others)
    paint(tmp_path / "c" / "train"), paint(tmp_path / "c" / "val", kinds=("dark", "grey"))
    with pytest.raises(Exception, match="different classes: grey, light"):
        split(tmp_path / "c", 0.2, 0)
    paint(tmp_path / "d", count=1)
    with pytest.raises(Exception, match="none would be left to train on"):
        split(tmp_path / "d", 0.2, 0)


def test_an_empty_class_is_named(tmp_path):
    (paint(tmp_path / "a") / "none").mkdir()
    with pytest.raises(Exception, match="no images in none. Fill the folder, or remove it"):
        read_folder(tmp_path / "a")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_as_the_model_wants_them(tmp_path, channels):
    some = split(paint(tmp_path / "a"), 0.2, 0)[1]
    for train in (False, True):
        image = Images(some, 16, channels, 0.9, [0.5] * channels, [0.25] * channels, train)[0]
        assert image["pixel_values"].shape == (channels, 16, 16) and image["pixel_values"].dtype == torch.float32
    plain = Images(some, 16, channels, 0.9, [0.0] * channels, [1.0] * channels)
    assert plain[1]["pixel_values"].min() >= 0 and plain[1]["pixel_values"].max() <= 1
    torch.testing.assert_close(Images(some, 16, channels, 0.9, [0.5] * channels, [0.25] * channels)[1]["pixel_values"], (plain[1]["pixel_values"] - 0.5) / 0.25)


@pytest.mark.parametrize("mode", ["distill", "copy"])
def test_train_writes_a_student_that_loads(tmp_path, mode):
    from transformers import AutoModelForImageClassification

    teacher, data, out = tiny_folder(tmp_path / "teacher"), paint(tmp_path / "data"), tmp_path / "out"
    said = command("train", "--teacher", teacher, "--data", data, "--mode", mode, "--epochs", 2, "--batch", 4, "--out", out)
    assert "held-out images told right" in said and ("copies" in said.split("held-out")[-1]) == (mode == "copy")
    student = AutoModelForImageClassification.from_pretrained(out)
    assert student.config.label2id == {"dark": 0, "light": 1} and (mode == "copy" or load_model(str(out))[1]["size"] == 16)
    kept = json.loads((out / "transfer.json").read_text())
    assert kept["mode"] == mode and kept["images"] == [12, 4] and any("attention" in row for row in kept["history"]) == (mode == "distill")
    assert (out / "curves.png").stat().st_size > 1000
    if mode == "copy":
        said = command("maps", data / "dark" / "0.png", "--teacher", teacher, "--student", out, "--out", tmp_path / "m.png", code=2)
        assert "no attention of its own" in " ".join(said.replace("│", " ").split())
    else:
        command("maps", data / "dark" / "0.png", "--teacher", teacher, "--student", out, "--out", tmp_path / "m.png")
        assert (tmp_path / "m.png").stat().st_size > 1000


def test_training_goes_on_where_it_was(tmp_path):
    teacher, data = tiny_folder(tmp_path / "teacher"), paint(tmp_path / "data")
    options = ("--teacher", teacher, "--data", data, "--epochs", 2, "--batch", 4, "--out")
    command("train", *options, tmp_path / "whole"), command("train", *options, tmp_path / "again")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    last = sorted((tmp_path / "again").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[-1]
    shutil.rmtree(last)
    command("train", *options, tmp_path / "again", "--resume")
    for name, part in load_file(tmp_path / "again" / "model.safetensors").items():
        torch.testing.assert_close(part, whole[name])
    said = " ".join(command("train", *options, tmp_path / "again", "--resume", "--seed", 7, "--mode", "copy", code=2).replace("│", " ").split())
    assert "mode was 'distill' and is 'copy'" in said and "seed was 0 and is 7" in said


def test_a_timm_student_by_name(tmp_path):
    sizes = dict(hidden_size=24, num_hidden_layers=12, num_attention_heads=3)
    teacher, data = tiny_folder(tmp_path / "teacher", image_size=32, patch_size=16, **sizes), paint(tmp_path / "data", count=3)
    options = ("--data", data, "--student", "vit_tiny_patch16_224", "--epochs", 1, "--batch", 2)
    command("train", "--teacher", teacher, *options, "--layers", "0:2", "--out", tmp_path / "out")
    student, prepared = load_model(str(tmp_path / "out"))
    assert (student.num_classes, prepared["size"], type(student).__name__) == (2, 32, "VisionTransformer")
    other = tiny_folder(tmp_path / "other", **sizes)  # five tokens, where the student has two
    said = command("train", "--teacher", other, *options, "--out", tmp_path / "new", code=2)
    assert "teacher" in said and "tokens" in said, said


def test_few_take_as_many_of_each_kind_and_none_held_out():
    labels = torch.arange(60_000) % 10
    images = torch.arange(60_000.0)[:, None, None, None].expand(-1, 1, 28, 28)
    chosen, kinds = reproduce.few(images, labels, 200, 3)
    assert kinds.bincount().tolist() == [20] * 10 and chosen.max() < 55_000 and len(chosen[:, 0, 0, 0].unique()) == 200
    assert torch.equal(chosen[:, 0, 0, 0].long() % 10, kinds)
    again, other = reproduce.few(images, labels, 200, 3)[0], reproduce.few(images, labels, 200, 4)[0]
    assert torch.equal(chosen, again) and not torch.equal(chosen, other)


@pytest.mark.parametrize("method", reproduce.METHODS)
def test_contestants_learn_and_are_the_same_again(method):
    teacher = fashion_vit(0, depth=2, embed_dim=16, num_heads=2).eval()
    labels = torch.arange(128) % 2
    images = torch.randn(128, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 0.1 + labels[:, None, None, None]
    model, history = reproduce.run(method, teacher, (images, labels), 4, 1e-2, 5)
    assert len(history) == 4 and history[-1] < history[0] and not model.training
    assert reproduce.run(method, teacher, (images, labels), 4, 1e-2, 5)[1] == history
    assert reproduce.run(method, teacher, (images, labels), 1, 1e-2, 6)[1] != history[:1]
    logits = reproduce.scores(model, images)
    assert logits.shape == (128, 10) and not logits.requires_grad
    student = reproduce.contestant(method, teacher, 5)
    own, theirs = (dict(model.named_parameters())["blocks.0.attn.qkv.weight"] for model in (getattr(student, "student", student), teacher))
    assert torch.equal(own, theirs) == (method == "fine-tuned")


def test_pictures_are_opened_as_they_are_meant(tmp_path):
    from PIL import Image

    ramp = np.tile(np.linspace(0, 255, 16).round().astype("uint8"), (8, 1))
    plain = Image.fromarray(ramp)
    plain.save(tmp_path / "8.png"), Image.fromarray(ramp.astype("uint16") * 257).save(tmp_path / "16.png")
    for name in ("8.png", "16.png"):
        assert (np.asarray(open_image(tmp_path / name, 1)) == ramp).all()
    holes = Image.merge("LA", (plain, Image.fromarray((ramp > 127).astype("uint8") * 255)))
    holes.save(tmp_path / "holes.png")
    seen = np.asarray(open_image(tmp_path / "holes.png", 1))
    assert (seen[ramp <= 127] == 255).all() and (seen[ramp > 127] == ramp[ramp > 127]).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    plain.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    assert open_image(tmp_path / "turned.jpg", 1).size == (8, 16) and open_image(tmp_path / "turned.jpg", 3).mode == "RGB"
    Image.fromarray(ramp.astype("float32")).save(tmp_path / "float.tif")
    whole = (paint(tmp_path / "a") / "dark" / "0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for name in ("float.tif", "cut.png", "none.png"):
        with pytest.raises(OSError):
            open_image(tmp_path / name, 1)


def test_what_is_no_image_is_counted_and_a_lonely_train_is_refused(tmp_path):
    folder = paint(tmp_path / "a")
    (folder / "dark" / "note.heic").write_bytes(b"?"), (folder / "light" / "list.txt").write_text("?"), (folder / ".git").mkdir()
    assert read_folder(folder)[2] == {".heic": 1, ".txt": 1} and read_folder(folder)[0] == ["dark", "light"]
    paint(tmp_path / "b", kinds=("Train", "other"))
    with pytest.raises(Exception, match="no folder named val"):
        split(tmp_path / "b", 0.2, 0)
    paint(tmp_path / "c" / "Train", count=2), paint(tmp_path / "c" / "Validation", count=1)
    assert [len(part) for part in split(tmp_path / "c", 0.2, 0)[1:3]] == [4, 2]


def test_a_half_precision_teacher_trains_a_float32_student(tmp_path):
    from transformers import AutoModel

    teacher = tiny_folder(tmp_path / "teacher")
    AutoModel.from_pretrained(teacher).half().save_pretrained(teacher)
    assert {p.dtype for p in load_model(str(teacher))[0].parameters()} == {torch.float32}
    command("train", "--teacher", teacher, "--data", paint(tmp_path / "data", count=3), "--epochs", 1, "--batch", 2, "--out", tmp_path / "out")
    assert {part.dtype for part in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_a_diverged_student_is_not_written(tmp_path):
    teacher = tiny_folder(tmp_path / "teacher")
    said = command("train", "--teacher", teacher, "--data", paint(tmp_path / "data", count=3), "--epochs", 2, "--batch", 2, "--rate", 1e30, "--out", tmp_path / "out", code=2)
    assert "too high" in said and not (tmp_path / "out" / "model.safetensors").exists()


def test_models_that_cannot_be_drawn_are_refused(tmp_path):
    from transformers import BitImageProcessor, ViTMAEConfig, ViTMAEModel

    folder = tmp_path / "mae"
    ViTMAEModel(ViTMAEConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=32, patch_size=8, mask_ratio=0.0)).save_pretrained(folder)
    picture = paint(tmp_path / "data") / "dark" / "0.png"
    said = command("maps", picture, "--teacher", folder, "--student", folder, code=2)
    assert "preprocessor_config.json" in " ".join(said.replace("│", " ").split())
    BitImageProcessor(size=dict(shortest_edge=32), crop_size=dict(height=32, width=32)).save_pretrained(folder)
    assert "differently each time" in " ".join(command("maps", picture, "--teacher", folder, "--student", folder, code=2).replace("│", " ").split())


def test_two_processes_train_one_student(tmp_path):
    teacher, data = tiny_folder(tmp_path / "teacher"), paint(tmp_path / "data")
    script = "import sys; from paperbook.attention_transfer.cli import app; app(sys.argv[1:])"
    (tmp_path / "go.py").write_text(script)
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29517", tmp_path / "go.py", "train", "--teacher", teacher, "--data", data, "--mode", "copy", "--epochs", "2", "--batch", "2", "--out", tmp_path / "out"]
    done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    history = json.loads((tmp_path / "out" / "transfer.json").read_text())["history"]
    assert max(row["step"] for row in history) == 6  # twelve images, four at a time, twice


def test_an_ensemble_is_the_mean_of_probabilities():
    pair = AttentionTransfer(vit(), vit(seed=1)).eval()
    models = [vit(seed=2), pair, vit(seed=3)]
    with torch.no_grad():
        probabilities = [(out if isinstance(out, torch.Tensor) else out.logits).double().softmax(-1) for out in (model(images()) for model in models)]
        answer = Ensemble(*models)(images())
    torch.testing.assert_close(answer.double().exp(), sum(probabilities) / 3, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(answer, Ensemble(*models[::-1])(images()))


def test_an_ensemble_keeps_what_one_model_rules_out():
    class Says(nn.Module):
        def __init__(self, *logits):
            super().__init__()
            self.logits = torch.tensor([logits])

        def forward(self, x):
            return self.logits

    answer = Ensemble(Says(1e4, 0.0), Says(0.0, 1e4))(None)
    torch.testing.assert_close(answer.exp(), torch.tensor([[0.5, 0.5]]))
    assert Ensemble(Says(0.0, -1e4))(None).tolist() == [[0.0, -1e4]]


def test_an_ensemble_refuses_what_has_no_mean():
    with pytest.raises(ValueError, match="models is empty"):
        Ensemble()
    with pytest.raises(ValueError, match=r"\(2, 5\), \(2, 3\)"):
        Ensemble(vit(), vit(num_classes=3))(images())


@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 9))
@settings(max_examples=20, deadline=None)
def test_likeness_stays_in_its_bounds(inputs, width, seed):
    generator = torch.Generator().manual_seed(seed)
    X, Y = (torch.randn(inputs, wide, generator=generator) for wide in (width, width + 1))
    assert -1e-9 <= linear_cka(X, Y) <= 1 + 1e-9
    P, Q = (torch.randn(2, 3, inputs, width, generator=generator).softmax(-1) for _ in range(2))
    matched, ordered = attention_jsd(P, Q), attention_jsd(P, Q, match=False)
    assert -1e-9 <= matched <= ordered + 1e-9 <= np.log(2) + 2e-9


def test_the_rate_rises_then_falls():
    shares = [warm_cosine(step, 200, 0.1) for step in range(200)]
    top = int(np.argmax(shares))
    assert 15 <= top <= 20 and shares[0] == 0.05 and shares[-1] < 1e-3
    assert np.all(np.diff(shares[: top + 1]) > 0) and np.all(np.diff(shares[top:]) < 0)


def test_a_student_of_a_teacher_in_eval_mode_is_ready_to_train():
    teacher = vit(proj_drop_rate=0.5, drop_path_rate=0.5)
    pair = AttentionTransfer(teacher, student_from_teacher(teacher))
    assert pair.student.training and not teacher.training
    assert not torch.equal(pair(images()).logits, pair(images()).logits)


@pytest.mark.parametrize("fused", [True, False])
def test_differential_attention_is_refused_and_a_block_with_its_own_attention_seen(fused):
    before = timm.layers.use_fused_attn()
    try:
        timm.layers.set_fused_attn(fused)
        difference, parallel = (timm.create_model(name, img_size=64, depth=2) for name in ("vit_dwee_patch16_reg1_gap_256", "vit_pwee_patch16_reg1_gap_256"))
    finally:
        timm.layers.set_fused_attn(before)
    with pytest.raises(NotImplementedError, match="difference of two maps"), AttentionTap(difference):
        difference(images())
    with AttentionTap(parallel) as tap:
        parallel(images())
    assert len(tap.calls) == 2


@pytest.mark.parametrize(
    "wrong",
    [dict(layers=[True, False]), dict(layers=2), dict(layers=[0, 0]), dict(heads=[0, 1, 1]), dict(heads={0: [1]}), dict(heads=slice(2)), dict(heads=[7], mode="copy"),
     dict(layers=[-9]), dict(layers=slice(0, 9)), dict(weight="3"), dict(backend="cuda")],
    ids=str,
)
def test_what_is_transferred_must_be_said_plainly(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        AttentionTransfer(vit(), vit(seed=1), **wrong)(images())


def test_images_without_numbers_are_named():
    with pytest.raises(ValueError, match="pixel_values"):
        AttentionTransfer(vit(), vit(seed=1))(images() * torch.nan)


def test_layers_may_be_changed_between_calls():
    pair = AttentionTransfer(vit(), vit(seed=1), layers=[0])
    first = pair(images()).layers
    pair.layers = [0, 2]
    both = pair(images()).layers
    assert len(first) == 1 and len(both) == 2 and torch.allclose(first[0], both[0])


def test_scales_and_masks_that_would_be_misread_are_refused():
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="scale_s is a tensor"):
        attention_ce(q, q, q, q, scale_s=torch.ones((), requires_grad=True))
    with pytest.raises(ValueError, match="mask_t is of torch.uint8"):
        attention_ce(q, q, q, q, mask_t=torch.ones(3, 3, dtype=torch.uint8))
