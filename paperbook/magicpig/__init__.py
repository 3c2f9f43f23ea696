"""MagicPIG: LSH sampling for efficient LLM generation (arXiv 2410.16179)."""

from .attention import (DecodeMeter, attend_exact, attend_sampled, compare_estimators, lsh_attention, magicpig_attention,
                        merge_states, quest_attention)
from .derive import (CapturedAttention, Estimate, capture_attention, collision_probability, full_attention,
                     oracle_sampling_attention, topk_attention)
from .kernels import decode_attention
from .generate import CacheStats, Continuation, MagicPIGCache, continue_text, register
from .index import KeyIndex, choose_config, draw_keys
from .signature import Signatures, hamming_probability
from .tables import HashTables, LSHConfig, SimHash

__all__ = ["CacheStats", "CapturedAttention", "Continuation", "DecodeMeter", "Estimate", "HashTables", "KeyIndex", "LSHConfig",
           "MagicPIGCache", "SimHash", "attend_exact", "attend_sampled", "capture_attention", "collision_probability",
           "compare_estimators", "continue_text", "draw_keys", "full_attention", "lsh_attention", "magicpig_attention", "merge_states",
           "oracle_sampling_attention", "quest_attention", "register", "topk_attention"]
