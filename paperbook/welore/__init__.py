"""WeLore (arXiv 2407.11239): compress a transformers model by its own spectrum, and tune what is low-rank."""

from .compress import Compression, LowRankLinear, merge_low_rank_, welore_compress_
from .factors import collect_grams, factorize
from .ranks import Ranks, select_ranks
from .spectra import Spectra, singular_spectra

__all__ = ["Compression", "LowRankLinear", "Ranks", "Spectra", "collect_grams", "factorize", "merge_low_rank_", "select_ranks", "singular_spectra", "welore_compress_"]
