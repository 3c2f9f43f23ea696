"""WeLore (arXiv 2407.11239): compress a transformers model by its own spectrum, and tune what is low-rank."""

from .compress import Compression, LowRankLinear, merge_low_rank_, welore_compress_
from .factors import Gram, collect_grams, factorize, whitened_spectra
from .ranks import Ranks, select_ranks
from .spectra import Spectra, singular_spectra
from .tune import freeze_except_lrc_

__all__ = [
    "Compression", "Gram", "LowRankLinear", "Ranks", "Spectra", "collect_grams", "factorize", "freeze_except_lrc_", "merge_low_rank_", "select_ranks",
    "singular_spectra", "welore_compress_", "whitened_spectra",
]
