"""Ten papers on machine learning, derived, implemented, tested and measured.

Each chapter of the book is a subpackage: ``paperbook.magicpig``. What chapters share is ``paperbook.core``.
"""

__version__ = "0.1.0"
