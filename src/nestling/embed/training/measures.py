"""What measures a training: a `GridEvaluator` every size, evaluators of sentence-transformers the full model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from difflib import get_close_matches
from typing import Any

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.evaluation import BaseEvaluator, SequentialEvaluator

from nestling.embed.evaluation.agreement import AgreementEvaluator
from nestling.embed.evaluation.evaluator import GridEvaluator
from nestling.embed.ladder import Ladder
from nestling.embed.model.modes import in_eval_mode
from nestling.embed.model.projection import Projection
from nestling.errors import EvaluationError, NestlingError, OptionError
from nestling.options import shown

Metrics = dict[str, float]
OURS = (GridEvaluator, AgreementEvaluator)  # they measure every size


class Measures:
    """An evaluator, or several in turn, and the metric that checkpoints are chosen by.

    Stock evaluators say what their metrics are called only by measuring: they measure the model as it is given, before
    anything is written, which finds those that cannot; the training's own first measurement is then not repeated.

    Args:
        given: an evaluator, or a list of them, of which the last one's main metric counts (`SequentialEvaluator`).
        model: that will be trained.
        ladder: its sizes, for grids that have none of their own.

    Raises:
        OptionError: it is none.
        EvaluationError: it cannot measure this model.
        LadderError: a size that it measures does not fit the model.
    """

    def __init__(self, given: Any, model: SentenceTransformer, ladder: Ladder):
        self.evaluator, self.ladder = _one(given), ladder
        self.first: dict[int, Any] = {}
        self.names: dict[str, None] = {}
        for leaf in _leaves(self.evaluator):
            if isinstance(leaf, OURS):
                self.names |= dict.fromkeys(_with_ladder(leaf, ladder).metric_names(model))
            else:
                self.first[id(leaf)] = found = _measure(leaf, model)
                self.names |= dict.fromkeys(found if isinstance(found, dict) else ["evaluator"])
        if isinstance(self.evaluator, SequentialEvaluator):
            self.names["sequential_score"] = None

    @property
    def main(self) -> str:
        """The name of the evaluator's main metric."""
        if isinstance(self.evaluator, SequentialEvaluator):
            return "sequential_score"
        if isinstance(self.evaluator, OURS):
            return f"{self.evaluator.name}{'_' * bool(self.evaluator.name)}mean"
        return getattr(self.evaluator, "primary_metric", None) or next(iter(self.names))

    def check(self, metric: Any) -> None:
        """Raises:
        OptionError: nothing of that name is measured.
        """
        name = metric.removeprefix("eval_") if isinstance(metric, str) else metric
        if name not in self.names:
            near = get_close_matches(str(name), self.names, 3, 0.0)
            raise OptionError(
                f"metric_for_best_model={shown(metric)} is not measured: expected one such as {', '.join(near)}"
            )

    def choose(self, options: SentenceTransformerTrainingArguments, changes: Mapping[str, Any]) -> None:
        """Set the metric that checkpoints are chosen by: the one that was asked for, or the main one.

        Raises:
            OptionError: it is not measured.
        """
        asked = changes.get("metric_for_best_model")
        self.check(self.main if asked is None else asked)
        if asked is None:
            options.metric_for_best_model = f"eval_{self.main}"
            if changes.get("greater_is_better") is None:
                options.greater_is_better = bool(getattr(self.evaluator, "greater_is_better", True))

    def during(self, projections: dict[int, Projection]) -> BaseEvaluator:
        """The evaluator for the training: grids with its sizes and projections, where they have none of their own."""
        return self._during(self.evaluator, projections)

    def _during(self, evaluator: Any, projections: dict[int, Projection]) -> BaseEvaluator:
        if isinstance(evaluator, SequentialEvaluator):
            several = copy(evaluator)
            several.evaluators = [self._during(part, projections) for part in evaluator.evaluators]
            return several
        if not isinstance(evaluator, OURS):
            return _Measured(evaluator, self.first[id(evaluator)])
        grid = _with_ladder(evaluator, self.ladder)
        if evaluator.projections is None:
            grid.projections = projections
        return grid


class _Measured(BaseEvaluator):
    """An evaluator that has measured the model already, and is not asked again at the start of its training."""

    def __init__(self, evaluator: Any, first: Any):
        super().__init__()
        self.evaluator, self.first = evaluator, first

    def __call__(self, model, output_path=None, epoch=-1, steps=-1):
        first, self.first = self.first, None
        found = first if steps == 0 and first is not None else self.evaluator(model, output_path, epoch, steps)
        self.primary_metric = getattr(self.evaluator, "primary_metric", None)
        return dict(found) if isinstance(found, dict) else found


def _one(given: Any) -> BaseEvaluator:
    if isinstance(given, BaseEvaluator):
        return given
    if isinstance(given, list | tuple) and given and all(isinstance(part, BaseEvaluator) for part in given):
        return given[0] if len(given) == 1 else SequentialEvaluator(given)
    raise OptionError(
        f"evaluator={shown(given)}: expected a GridEvaluator, an evaluator of sentence-transformers, or a list of them"
    )


def _leaves(evaluator: Any) -> Iterator[Any]:
    for part in evaluator.evaluators if isinstance(evaluator, SequentialEvaluator) else ():
        yield from _leaves(part)
    if not isinstance(evaluator, SequentialEvaluator):
        yield evaluator


def _with_ladder(grid: Any, ladder: Ladder) -> Any:
    found = copy(grid)
    found.ladder = grid.ladder or ladder
    return found


def _measure(evaluator: Any, model: SentenceTransformer) -> Any:
    try:
        with in_eval_mode(model):
            found = evaluator(model)
    except NestlingError:
        raise
    except Exception as error:
        name = type(evaluator).__name__
        raise EvaluationError(f"{name} cannot measure this model ({type(error).__name__}: {error})") from error
    if isinstance(found, dict) and not found:
        raise EvaluationError(f"{type(evaluator).__name__} measures nothing")
    return found
