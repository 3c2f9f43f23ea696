"""CoGO: global optimizers that compose, for quadratic networks on abelian groups (arXiv 2410.01779)."""

from .exact import ExactSolution, Proof, exact_f6, exact_f46, exact_memorization, prove
from .factors import Factorization, FrequencyReport, factorize, node_frequencies, solution_table, spectrum
from .global_optima import f6, f46, memorization
from .loss_algebra import AbelianGroup, QuadraticNet, group_of, loss_by_potentials, loss_direct, loss_fourier, potentials
from .semiring import Block, Solution, SumPotential, z_nu, z_real, z_syn, z_xi
from .training import TrainConfig, TrainedRun, load_net, save_net, train

__all__ = ["AbelianGroup", "Block", "ExactSolution", "Factorization", "FrequencyReport", "Proof", "QuadraticNet", "Solution", "SumPotential",
           "TrainConfig", "TrainedRun", "exact_f46", "exact_f6", "exact_memorization", "f46", "f6", "factorize", "group_of", "load_net",
           "loss_by_potentials", "loss_direct", "loss_fourier", "memorization", "node_frequencies", "potentials", "prove", "save_net",
           "solution_table", "spectrum", "train", "z_nu", "z_real", "z_syn", "z_xi"]
