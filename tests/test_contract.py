"""The one contract that every chapter signs.

It builds from its configuration, its gradients are finite, the same seed gives the same numbers, its state saves and
loads, undoing it leaves the model bit for bit as it was, wrong input raises an error that names it, and the examples
in its docstrings run. A chapter that has notebooks and is not in `CHAPTERS` fails.
"""

import copy
import doctest
import importlib
import pkgutil

import pytest
import torch

from paperbook.core.book import load_book


class MagicPIG:
    """Decoding a small random Llama from an LSH sample of its keys."""

    def config(self, **changes):
        from paperbook.magicpig import LSHConfig

        small = dict(num_bits=4, num_tables=12, sink_tokens=2, local_tokens=8, dense_layers=(0,), min_length=32)
        return LSHConfig(**small | changes)

    def model_config(self):
        from transformers import LlamaConfig

        return LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512)

    def build(self, attn_implementation="magicpig"):
        from transformers import AutoModelForCausalLM

        from paperbook.magicpig import register

        register()
        torch.manual_seed(0)
        config = self.model_config()
        return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()

    def tokens(self):
        return torch.randint(128, (1, 160), generator=torch.Generator().manual_seed(1))

    @torch.no_grad()
    def run(self, model, seed=0):
        """Logits of eight decoded positions."""
        from paperbook.magicpig import MagicPIGCache

        cache, tokens = MagicPIGCache(model.config, self.config(seed=seed)), self.tokens()
        model(tokens[:, :-8], past_key_values=cache)
        steps = [model(token[:, None], past_key_values=cache).logits for token in tokens[:, -8:].T]
        assert 0 < cache.stats().share < 1, "nothing was sampled, so nothing was tested"
        return torch.cat(steps, 1)

    def gradients(self, model):
        tokens = self.tokens()
        model(tokens, labels=tokens).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    def save_and_load(self, model, folder):
        from transformers import AutoModelForCausalLM

        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="magicpig").eval()

    def apply_and_undo(self, model):
        """Run the method on a model that came without it, and take it away again."""
        model.set_attn_implementation("magicpig")
        self.run(model)
        model.set_attn_implementation("sdpa")

    def wrong_input(self):
        """(what to call, error, words its message must hold)"""
        from transformers import T5Config

        from paperbook.magicpig import MagicPIGCache

        plain = self.build(attn_implementation="sdpa")
        return [
            (lambda: self.config(num_bits=17), ValueError, ["num_bits", "17", "1..16"]),
            (lambda: self.config(num_tables=1), ValueError, ["num_tables", "1"]),
            (lambda: self.config(backend="cuda"), ValueError, ["backend", "'cuda'"]),
            (lambda: MagicPIGCache(T5Config(), self.config()), ValueError, ["t5"]),
            (lambda: MagicPIGCache(self.model_config(), "fast"), TypeError, ["config", "'fast'"]),
            (lambda: MagicPIGCache(self.model_config(), self.config(dense_layers=(9,))), ValueError, ["dense_layers", "9"]),
            (lambda: self.run(plain), RuntimeError, ["sdpa", "magicpig"]),
        ]


class AttentionTransfer:
    """A small random ViT of transformers that copies the attention of another one."""

    def teacher(self):
        return self.build(seed=7)

    def build(self, attn_implementation="sdpa", seed=0):
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(seed)
        return ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                                                   image_size=32, patch_size=8, num_labels=5)).eval()

    def tokens(self):
        return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))

    def pair(self, model, mode="copy"):
        from paperbook.attention_transfer import AttentionTransfer

        return AttentionTransfer(self.teacher(), model, mode).eval()

    @torch.no_grad()
    def run(self, model, seed=0):
        """The model's answer with copied maps, beside that of a fresh student."""
        from paperbook.attention_transfer import student_from_teacher

        copied = self.pair(model)(self.tokens()).logits
        torch.manual_seed(seed)
        return torch.cat([copied, student_from_teacher(model).eval()(self.tokens()).logits])

    def gradients(self, model):
        self.pair(model, "distill").train()(self.tokens(), labels=torch.tensor([0, 3])).loss.backward()
        return [parameter.grad for parameter in model.parameters()]

    def save_and_load(self, model, folder):
        from transformers import ViTForImageClassification

        self.pair(model, "distill").export().save_pretrained(folder)
        return ViTForImageClassification.from_pretrained(folder).eval()

    def apply_and_undo(self, model):
        """Copying happens in a context; behind it the model is its own again."""
        from paperbook.attention_transfer import AttentionTap

        self.run(model)
        with AttentionTap(model, until=1):
            model(self.tokens())

    def wrong_input(self):
        from paperbook.attention_transfer import AttentionTap, AttentionTransfer, attention_ce

        q, model = torch.zeros(1, 2, 5, 4), self.build()
        return [
            (lambda: AttentionTransfer(self.teacher(), model, "steal"), ValueError, ["mode", "'steal'", "distill"]),
            (lambda: AttentionTransfer(self.teacher(), model, weight=-1), ValueError, ["weight=-1"]),
            (lambda: AttentionTransfer(model, model), ValueError, ["share weights"]),
            (lambda: AttentionTap(model, until=0), ValueError, ["until=0"]),
            (lambda: attention_ce(q, q, q[:, :, :3], q[:, :, :3]), ValueError, ["5", "3", "queries"]),
            (lambda: self.pair(model).export(), TypeError, ["copy", "teacher"]),
        ]


class CoGO:
    """A quadratic network on a small group, and the training that changes it."""

    def config(self, **changes):
        from paperbook.cogo import TrainConfig

        return TrainConfig(**dict(orders=(2, 3), hidden=8, epochs=20) | changes)

    def build(self, attn_implementation=None):
        from paperbook.cogo import QuadraticNet

        torch.manual_seed(0)
        return QuadraticNet((2, 3), 8)

    def tokens(self):
        return torch.cartesian_prod(torch.arange(6), torch.arange(6))

    @torch.no_grad()
    def run(self, model, seed=0):
        """The model's outputs, beside those of a short training."""
        from paperbook.cogo import train

        return torch.cat([model(self.tokens()), train(self.config(seed=seed), progress=False).net(self.tokens())])

    def gradients(self, model):
        model(self.tokens()).square().mean().backward()
        return [parameter.grad for parameter in model.parameters()]

    def save_and_load(self, model, folder):
        from paperbook.cogo import load_net, save_net

        save_net(model, folder / "net.safetensors")
        return load_net(folder / "net.safetensors")

    def apply_and_undo(self, model):
        """Reading a network must not change it."""
        from paperbook.cogo import Solution, factorize

        Solution.from_module(model).to_module()
        factorize(model)

    def wrong_input(self):
        from paperbook.cogo import AbelianGroup, f46, factorize

        return [
            (lambda: self.config(orders=1), ValueError, ["orders", "1"]),
            (lambda: self.config(dtype=torch.float16), ValueError, ["dtype", "half precision"]),
            (lambda: f46(AbelianGroup(7), order6=()), ValueError, ["order6", "order-6"]),
            (lambda: factorize(self.build().half()), ValueError, ["float16", "net.float()"]),
        ]


class QGaLore:
    """A small random Llama with 8-bit weights, and five steps of its optimizer."""

    def config(self, **changes):
        from paperbook.q_galore import QGaLoreConfig

        return QGaLoreConfig(**dict(rank=8, update_interval=2) | changes)

    def plain(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=48, intermediate_size=100, num_hidden_layers=2,
                                            num_attention_heads=4, num_key_value_heads=2)).eval()

    def build(self, attn_implementation=None):
        """With 8-bit weights; plain, with weights that lie on the grid, where the test asks for another attention."""
        from paperbook.q_galore import dequantize_, quantize_weights_

        model = quantize_weights_(self.plain(), self.config())
        return dequantize_(model) if attn_implementation else model

    def tokens(self):
        return torch.randint(128, (2, 40), generator=torch.Generator().manual_seed(1))

    def run(self, model, seed=0):
        """Logits before, and after a few steps of a copy."""
        from paperbook.q_galore import Int8Linear, QGaLoreAdamW, dequantize_, quantize_weights_

        trained = copy.deepcopy(model)
        if any(isinstance(module, Int8Linear) for module in trained.modules()):
            dequantize_(trained)
        quantize_weights_(trained, self.config(seed=seed))
        optimizer = QGaLoreAdamW(trained.parameters())
        for _ in range(5):
            trained(self.tokens(), labels=self.tokens()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return torch.cat([model(self.tokens()).logits, trained(self.tokens()).logits])

    def gradients(self, model):
        model(self.tokens(), labels=self.tokens()).loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.requires_grad]

    def save_and_load(self, model, folder):
        from transformers import AutoModelForCausalLM

        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder)

    def apply_and_undo(self, model):
        """Quantizing is lossy, so there is nothing to undo; but a copy that is trained must share nothing with its model."""
        self.run(model)

    def wrong_input(self):
        from paperbook.q_galore import QGaLoreAdamW, dequantize_, quantize_weights_

        return [
            (lambda: self.config(rank=0), ValueError, ["rank=0"]),
            (lambda: quantize_weights_(self.plain(), self.config(rank=25)), ValueError, ["k_proj", "24"]),
            (lambda: dequantize_(self.plain()), ValueError, ["Int8Linear"]),
            (lambda: QGaLoreAdamW(self.plain().parameters()), ValueError, ["quantize_weights_"]),
        ]


class WeLore:
    """A small random Llama, compressed along inputs that the seed chooses."""

    def build(self, attn_implementation=None):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=128, hidden_size=48, intermediate_size=100, num_hidden_layers=2,
                                            num_attention_heads=4, num_key_value_heads=2)).eval()

    def tokens(self):
        return torch.randint(128, (2, 40), generator=torch.Generator().manual_seed(1))

    def compressed(self, model, seed=0):
        from paperbook.welore import collect_grams, select_ranks, singular_spectra, welore_compress_

        low = copy.deepcopy(model)
        grams = collect_grams(low, [torch.randint(128, (4, 60), generator=torch.Generator().manual_seed(seed))])
        welore_compress_(low, select_ranks(singular_spectra(low), 0.6), grams)
        return low

    @torch.no_grad()
    def run(self, model, seed=0):
        return self.compressed(model, seed)(self.tokens()).logits

    def gradients(self, model):
        low = self.compressed(model)
        low(self.tokens(), labels=self.tokens()).loss.backward()
        return [parameter.grad for parameter in low.parameters()]

    def save_and_load(self, model, folder):
        from transformers import AutoModelForCausalLM

        low = self.compressed(model)
        low.save_pretrained(folder / "low")
        again = AutoModelForCausalLM.from_pretrained(folder / "low")
        assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in low.state_dict().items())
        model.save_pretrained(folder / "dense")
        return AutoModelForCausalLM.from_pretrained(folder / "dense")

    def apply_and_undo(self, model):
        """Compressing is lossy, so there is nothing to undo; but looking at a model must not change it."""
        from paperbook.welore import collect_grams, select_ranks, singular_spectra

        select_ranks(singular_spectra(model))
        collect_grams(model, [self.tokens().repeat(2, 1)])

    def wrong_input(self):
        from paperbook.welore import merge_low_rank_, select_ranks, singular_spectra, welore_compress_

        spectra = singular_spectra(self.build())
        return [
            (lambda: select_ranks(spectra, 1.0), ValueError, ["err=1.0"]),
            (lambda: singular_spectra(self.build(), "encoder"), ValueError, ["encoder"]),
            (lambda: welore_compress_(self.build(), {"model.norm": 3}), ValueError, ["model.norm"]),
            (lambda: merge_low_rank_(self.build()), ValueError, ["LowRankLinear"]),
        ]


class TTG:
    """A small random Llama with an adapter for drafts, on the grammar's sentences."""

    def base(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1))

    def build(self, attn_implementation=None):
        from peft import LoraConfig, get_peft_model

        return get_peft_model(self.base(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))

    def tokenizer(self):
        from transformers import AutoTokenizer

        from paperbook.core.assets import find

        return AutoTokenizer.from_pretrained(find("SmolLM2-135M-Instruct"))

    def tokens(self):
        return torch.randint(49152, (1, 16), generator=torch.Generator().manual_seed(1))

    def loss(self, model, seed=0):
        from paperbook.ttg.translate import _AnswerLoss, _pad, _pairs

        return _AnswerLoss(model)(**_pad(next(_pairs(self.tokenizer(), 2, seed)), 2))

    @torch.no_grad()
    def run(self, model, seed=0):
        return self.loss(model, seed)

    def gradients(self, model):
        self.loss(model).backward()
        return [weight.grad for weight in model.parameters() if weight.requires_grad]

    def save_and_load(self, model, folder):
        from peft import PeftModel

        model.save_pretrained(folder)
        return PeftModel.from_pretrained(self.base(), folder)

    def apply_and_undo(self, model):
        """Reading a sentence must not change the model that reads it."""
        from paperbook.ttg import TranslationError, Translator

        with pytest.raises(TranslationError):  # a random model does not come to an end
            Translator(model, self.tokenizer()).write(["Two of us to Boston."], constrained=False, max_new_tokens=2)

    def wrong_input(self):
        from paperbook.ttg import Plan, Request, RequestGrammar, Translator, train_adapter

        return [
            (lambda: Request(travellers=9), ValueError, ["travellers", "8"]),
            (lambda: RequestGrammar().sample("test"), ValueError, ["test", "unseen"]),
            (lambda: Plan.from_json("{}"), ValueError, ["no plan"]),
            (lambda: train_adapter("folder", samples=0), ValueError, ["samples=0"]),
            (lambda: Translator(self.base(), self.tokenizer()).write([""]), ValueError, ["text=''"]),
        ]


class AgentAsAJudge:
    """A small random Llama that judges a workspace by its probability of yes."""

    def build(self, attn_implementation=None):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                            num_key_value_heads=1, max_position_embeddings=8192)).eval()

    def tokenizer(self):
        from transformers import AutoTokenizer

        from paperbook.core.assets import find

        return AutoTokenizer.from_pretrained(find("SmolLM2-135M-Instruct"))

    def tokens(self):
        return torch.randint(49152, (1, 16), generator=torch.Generator().manual_seed(1))

    def report(self, model, seed=0):
        import tempfile

        from paperbook.agent_as_a_judge import JudgeConfig, LocalJudge, run
        from paperbook.agent_as_a_judge.testbed import generate

        with tempfile.TemporaryDirectory() as folder:
            case = generate(f"{folder}/cases", 1, seed)[0]
            small = JudgeConfig(("locate", "read"), max_files=1, max_file_tokens=100, max_tree_tokens=100)
            return run(LocalJudge(model, self.tokenizer(), small), case.task, case.workspace, progress=False)

    def run(self, model, seed=0):
        """Probabilities of a task's requirements, as many as every task has."""
        return torch.tensor([verdict.score for verdict in self.report(model, seed).verdicts][:4])

    def gradients(self, model):
        """Judging trains nothing; a model that has judged can still be trained."""
        self.report(model)
        model(self.tokens(), labels=self.tokens()).loss.backward()
        return [weight.grad for weight in model.parameters()]

    def save_and_load(self, model, folder):
        from transformers import AutoModelForCausalLM

        from paperbook.agent_as_a_judge import Report

        report = self.report(model)
        report.save(folder / "report.json")
        assert Report.load(folder / "report.json") == report
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    def apply_and_undo(self, model):
        """Judging must not change the model that judges."""
        self.report(model)

    def wrong_input(self):
        from paperbook.agent_as_a_judge import JudgeConfig, LocalJudge, Task, Workspace, WorkspaceError, metrics
        from paperbook.agent_as_a_judge.testbed import generate

        task = Task(name="t", requirements=["a"])
        return [
            (lambda: Task(name="t", requirements=[{"criteria": "a", "prerequisites": [4]}]), ValueError, ["'t'", "[4]"]),
            (lambda: Workspace("nowhere"), WorkspaceError, ["nowhere"]),
            (lambda: JudgeConfig(("guess",)), ValueError, ["guess", "locate"]),
            (lambda: LocalJudge(self.build(), self.tokenizer(), threshold=1), ValueError, ["threshold=1"]),
            (lambda: metrics.alignment({"t": task}, {"u": task}), ValueError, ["intersect"]),
            (lambda: generate("folder", split="validation"), ValueError, ["validation", "test"]),
        ]


CHAPTERS = {"attention_transfer": AttentionTransfer(), "magicpig": MagicPIG(), "q_galore": QGaLore(), "welore": WeLore(), "cogo": CoGO(), "agent_as_a_judge": AgentAsAJudge(), "ttg": TTG()}
OWN = {"core", "reference"}  # the house itself makes no such promise

chapters = pytest.mark.parametrize("chapter", CHAPTERS.values(), ids=CHAPTERS)


def test_every_written_chapter_has_signed():
    written = {chapter.name for chapter in load_book() if chapter.notebooks} - OWN
    assert written == set(CHAPTERS), "add the chapter to CHAPTERS in this file"


@chapters
def test_same_seed_same_numbers(chapter):
    model = chapter.build()
    first, again, other = chapter.run(model, seed=0), chapter.run(model, seed=0), chapter.run(model, seed=1)
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert not torch.equal(first, other), "the seed changes nothing"


@chapters
def test_gradients_are_finite(chapter):
    gradients = chapter.gradients(chapter.build())
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    assert any(gradient.abs().sum() > 0 for gradient in gradients)


@chapters
def test_state_saves_and_loads(chapter, tmp_path):
    model = chapter.build()
    loaded = chapter.save_and_load(model, tmp_path)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    # Not bit for bit: where a loaded tensor lies in memory decides the order in which a product is summed.
    torch.testing.assert_close(chapter.run(loaded), chapter.run(model), rtol=1e-5, atol=1e-6)


@chapters
def test_undone_leaves_the_model_as_it_was(chapter):
    """Held against a copy that never saw the method: a patched model equals itself even when it was not undone."""
    model = chapter.build(attn_implementation="sdpa")
    untouched, tokens = copy.deepcopy(model), chapter.tokens()
    chapter.apply_and_undo(model)
    with torch.no_grad():
        after, before = (getattr(output, "logits", output) for output in (model(tokens), untouched(tokens)))
        assert torch.equal(after, before)
    before = untouched.state_dict()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if hasattr(model, "config"):  # a transformers model; a plain nn.Module has none
        assert model.config.to_dict() == untouched.config.to_dict()
        assert model.config._attn_implementation == untouched.config._attn_implementation


@chapters
def test_wrong_input_is_named(chapter):
    for call, error, words in chapter.wrong_input():
        with pytest.raises(error) as raised:
            call()
        assert all(word in str(raised.value) for word in words), f"{raised.value} lacks one of {words}"


@pytest.mark.parametrize("name", CHAPTERS)
def test_docstring_examples_run(name):
    package = importlib.import_module(f"paperbook.{name}")
    modules = [importlib.import_module(f"paperbook.{name}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    results = [doctest.testmod(module, optionflags=doctest.ELLIPSIS) for module in modules]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) > 0, f"no docstring of paperbook.{name} shows an example (>>>)"
