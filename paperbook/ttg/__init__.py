"""To the Globe (TTG): from a sentence to an itinerary that is proven to be the best (arXiv 2410.16456)."""

from .endpoint import EndpointTranslator
from .grammar import RequestGrammar
from .infeasible import Infeasible, Remedy, explain
from .milp import MissingField, SolverTimeout, TravelModel
from .plan import Plan, verify
from .request import Ambiguous, Draft, Request, resolve
from .translate import Translation, TranslationError, Translator, train_adapter
from .world import World

__all__ = ["Ambiguous", "Draft", "EndpointTranslator", "Infeasible", "MissingField", "Plan", "Remedy", "Request", "RequestGrammar", "SolverTimeout",
           "Translation", "TranslationError", "Translator", "TravelModel", "World", "explain", "resolve", "train_adapter", "verify"]
