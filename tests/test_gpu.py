"""Parity on a CUDA device. Needs only torch, transformers and pytest, which is what GPU machines have."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from paperbook.magicpig import LSHConfig, MagicPIGCache, register

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_magicpig_decodes_on_cuda_as_on_the_cpu(dtype):
    register()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=90, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
                         num_key_value_heads=2, max_position_embeddings=512)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="magicpig").eval()
    ids, mask = torch.randint(3, 90, (2, 160)), torch.ones(2, 160, dtype=torch.long)
    mask[1, :20] = 0
    everything = LSHConfig(num_bits=1, num_tables=512, min_length=16, local_tokens=8, dense_layers=())
    logits = {}
    with torch.no_grad():
        for device in ("cpu", "cuda"):
            cache = MagicPIGCache(model.to(device).config, everything)
            model(ids[:, :155].to(device), attention_mask=mask[:, :155].to(device), past_key_values=cache)
            steps = [(155, 156), (156, 160)]
            logits[device] = torch.cat([model(ids[:, a:b].to(device), attention_mask=mask[:, :b].to(device),
                                              past_key_values=cache).logits.cpu().float() for a, b in steps], 1)
            assert cache.stats().steps == 2
    gap = (logits["cpu"] - logits["cuda"]).abs().max() / logits["cpu"].std()
    assert gap < (0.1 if dtype == torch.bfloat16 else 1e-3), gap
