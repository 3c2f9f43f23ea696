"""Q-GaLore (arXiv 2407.08296): train every weight of a model with 8-bit weights, projected gradients and 8-bit states."""

from .linear import Int8Linear, dequantize_, quantize_weights_
from .memory import MemoryReport, build_quantized, memory_report
from .optimizer import QGaLoreAdamW, fused_backward, qgalore_param_groups
from .projection import QGaLoreConfig, leading_basis
from .quantize import Quantized

__all__ = ["Int8Linear", "MemoryReport", "QGaLoreAdamW", "QGaLoreConfig", "Quantized", "build_quantized", "dequantize_", "fused_backward", "leading_basis", "memory_report", "qgalore_param_groups",
           "quantize_weights_"]
