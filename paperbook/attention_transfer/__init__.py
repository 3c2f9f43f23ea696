"""Attention Transfer (arXiv 2411.09702): teach a vision transformer where to look, and nothing else."""

from .loss import attention_ce
from .tap import AttentionCall, AttentionTap
from .transfer import AttentionTransfer, TransferOutput, student_from_teacher

__all__ = ["AttentionCall", "AttentionTap", "AttentionTransfer", "TransferOutput", "attention_ce", "student_from_teacher"]
