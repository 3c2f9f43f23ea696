"""MagicPIG: LSH sampling for efficient LLM generation (arXiv 2410.16179)."""

from .attention import (DecodeMeter, attend_exact, attend_sampled, compare_estimators, lsh_attention, magicpig_attention,
                        merge_states, quest_attention)
from .derive import (CapturedAttention, Estimate, capture_attention, collision_probability, full_attention,
                     oracle_sampling_attention, topk_attention)
from .generate import CacheStats, Continuation, MagicPIGCache, continue_text, register
from .index import KeyIndex, choose_config, draw_keys
from .kernels import decode_attention, dense_attention
from .signature import Signatures, hamming_probability
from .tables import HashTables, LSHConfig, SimHash

__all__ = ["CacheStats", "CapturedAttention", "Continuation", "DecodeMeter", "Estimate", "HashTables", "KeyIndex", "LSHConfig",
           "MagicPIGCache", "Signatures", "SimHash", "attend_exact", "attend_sampled", "capture_attention", "choose_config",
           "collision_probability", "compare_estimators", "continue_text", "decode_attention", "dense_attention", "draw_keys",
           "full_attention", "hamming_probability", "lsh_attention", "magicpig_attention", "merge_states",
           "oracle_sampling_attention", "quest_attention", "register", "topk_attention"]
