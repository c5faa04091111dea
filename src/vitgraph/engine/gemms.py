"""GEMMs of graphs by the fastest algorithm that was measured.

cuBLASLt's heuristics name several, of which torch takes the first. On an H100 another one is faster for most numbers of
rows, by up to a quarter.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction

import torch
from torch import Tensor

from vitgraph.engine.cublaslt import ALIGNMENT, CublasLt, Problem, cublaslt
from vitgraph.engine.gemm_candidates import candidates
from vitgraph.engine.gemm_trial import TORCH, Trial
from vitgraph.layers.gemm import Product, products_by
from vitgraph.measured import cache_folder, keep_entry, read_entry
from vitgraph.workspace import without_workspace

logger = logging.getLogger("vitgraph")

DTYPES = (torch.bfloat16, torch.float16)
MOST_WEIGHTS = 32
"""Weights that trial runs of a problem go through, so that they come from memory as in a tower, not from the cache."""

FINE_ROWS, FEW_USES = 4096, 8
"""See `Gemms._measure`."""

GENERATION = 4
"""Of what is kept: grows where faster algorithms are found than before."""

MOST_ROWS = 16384
"""Budgets of more pixel rows are left to torch: few calls fill them, and trial runs take longer."""

LEAST_USES = 2
"""Products that a forward makes less often are left to torch."""

Weights = dict[Problem, list[Tensor]]
"""Problems that were seen, and the weights of each, in the order of their use."""


class Gemms:
    """The algorithms of one device, and a context in which a tower's products run by them.

    Args:
        library: runs the products.
    """

    def __init__(self, library: CublasLt) -> None:
        self._library = library
        self.chosen: dict[Problem, bytes] = {}
        """Algorithms, TORCH where that is left to torch."""
        self._seen: Weights | None = None
        self.runs = 0
        """Products that ran by an algorithm that was chosen here."""

    def applied(self) -> AbstractContextManager[None]:
        """A context in which a tower's products run by the chosen algorithms; what nobody chose for runs as ever."""
        return products_by(self._run)

    @contextmanager
    def seeing(self) -> Iterator[Weights]:
        """Notes the products in `applied` contexts, which run as ever meanwhile."""
        seen: Weights = {}
        self._seen = seen
        try:
            yield seen
        finally:
            self._seen = None

    def choose(
        self, seen: Weights, rows: int, budgets: Iterable[int], tell: Callable[[], object] | None = None
    ) -> None:
        """Chooses an algorithm for every problem of budgets of at most MOST_ROWS rows, from what was measured before on
        this kind of GPU, or by measuring.

        Args:
            seen: the problems of a forward.
            rows: pixel rows of that forward. Rows of products grow with them.
            budgets: pixel rows of each budget.
            tell: called before anything is measured.
        """
        key = f"{self._library.gpu} | cuBLASLt {self._library.version} | {GENERATION}"
        path = cache_folder() / "gemms.json"
        kept = read_entry(path, key) or {}
        missing: list[tuple[Problem, list[Tensor]]] = []
        for problem, weights in _of_budgets(seen, rows, budgets):
            algorithm = _from_hex(kept.get(problem.name))
            if algorithm is not None and (algorithm == TORCH or self._library.accepts(problem, algorithm)):
                self.chosen[problem] = algorithm
            elif problem not in self.chosen:
                missing.append((problem, weights))
        if not missing:
            return
        if tell is not None:
            tell()
        logger.info("choosing algorithms for %d products", len(missing))
        self._measure(missing)
        torch.cuda.empty_cache()  # graphs could not use what the trial runs leave
        found = {problem.name: self.chosen[problem].hex() for problem, _ in missing if problem in self.chosen}
        if found:
            keep_entry(path, key, (read_entry(path, key) or {}) | found)

    def _measure(self, missing: Sequence[tuple[Problem, list[Tensor]]]) -> None:
        """Of products with many rows or few uses every other one is measured; those between take after the one before.
        What cannot be measured is left to torch."""
        before: dict[Problem, bytes] = {}
        try:
            trial = Trial(self._library, [problem for problem, _ in missing])
            with without_workspace(self._library.device):
                for problem, weights in sorted(missing, key=lambda one: one[0].rows):
                    shape = problem._replace(rows=0)
                    coarse = problem.rows > FINE_ROWS or len(weights) < FEW_USES
                    near = before.pop(shape, None) if coarse else None
                    tried = candidates(self._library, problem) if near is None else self._acceptable(problem, near)
                    chosen = self.chosen[problem] = trial.fastest(problem, tried, weights[:MOST_WEIGHTS])
                    if near is None:
                        before[shape] = chosen
        except RuntimeError as error:  # too little memory, above all
            logger.warning("some GEMMs of graphs run as torch chooses, for they could not be measured: %s", error)

    def _acceptable(self, problem: Problem, algorithm: bytes) -> list[bytes]:
        return [algorithm] if algorithm != TORCH and self._library.accepts(problem, algorithm) else []

    def _run(self, product: Product) -> Tensor | None:
        problem = problem_of(product) if product.x.device == self._library.device else None
        if problem is None:
            return None
        if self._seen is not None:
            self._seen.setdefault(problem, []).append(product.weight)
            return None
        algorithm = self.chosen.get(problem, TORCH)
        if algorithm == TORCH:
            return None
        x, out = product.x, product.out
        if out is None:
            out = x.new_empty(problem.rows, problem.columns)
        self._library.run(problem, algorithm, x, product.weight, product.bias, out)
        self.runs += 1
        return out


def make_gemms(device: torch.device, dtype: torch.dtype) -> Gemms | None:
    """For a tower, where it is of use: in half precision on an NVIDIA GPU."""
    if device.type != "cuda" or dtype not in DTYPES or torch.version.cuda is None:
        return None
    try:
        return Gemms(cublaslt(device))
    except (OSError, RuntimeError, AttributeError) as error:
        logger.warning("GEMMs of graphs run as torch chooses: %s", error)
        return None


def problem_of(product: Product) -> Problem | None:
    """The product as the library takes it; None where a matrix has gaps or another dtype, or is not aligned."""
    kind, x, weight, bias, out = product
    if x.dim() != 2 or x.dtype not in DTYPES or not len(x):
        return None
    if bias is not None and (bias.dtype != x.dtype or not bias.is_contiguous()):
        return None
    matrices = (x, weight) if out is None else (x, weight, out)
    if any(own.dtype != x.dtype or not own.is_contiguous() or own.data_ptr() % ALIGNMENT for own in matrices):
        return None
    return Problem(x.shape[0], weight.shape[0], x.shape[1], kind, x.dtype)


def _of_budgets(seen: Weights, rows: int, budgets: Iterable[int]) -> Iterator[tuple[Problem, list[Tensor]]]:
    """The problems that were seen more than once, as budgets of at most MOST_ROWS rows have them, each once; without
    those whose rows do not grow as pixel rows do."""
    given: set[Problem] = set()
    often = [(problem, weights) for problem, weights in seen.items() if len(weights) >= LEAST_USES]
    for budget in budgets:
        for problem, weights in often if budget <= MOST_ROWS else []:
            own = Fraction(problem.rows * budget, rows)
            scaled = problem._replace(rows=int(own))
            if own.denominator == 1 and scaled not in given:
                given.add(scaled)
                yield scaled, weights


def _from_hex(text: object) -> bytes | None:
    try:
        return bytes.fromhex(text) if isinstance(text, str) else None
    except ValueError:
        return None
