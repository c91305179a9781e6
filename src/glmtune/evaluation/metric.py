"""The user's own metrics: `--metric module:function`."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmtune.errors import UserError, reason_of
from glmtune.evaluation.labels import Text
from glmtune.evaluation.scores import MEASURES, Measure
from glmtune.imports import leave_out_nothing

if TYPE_CHECKING:
    from glmtune.evaluation.report import Pair


@dataclass(frozen=True)
class Metric:
    """A function ``(answer, reference, record) -> float``; more is better."""

    spec: str
    """The text of the flag."""
    function: Callable[[str, str, dict[str, Any]], float]

    @property
    def name(self) -> str:
        """The name of its column: that of the function."""
        return self.spec.partition(":")[2]

    @property
    def measure(self) -> Measure:
        """How it is shown."""
        return Measure(Text(self.name, self.name), Text("", ""), digits=3)

    def score(self, answer: str, pair: "Pair") -> float:
        """The score of one answer.

        Raises:
            UserError: the function raises, or returns no finite number.
        """
        record = {"row": pair.number, "instruction": pair.instruction, "input": pair.input}
        record |= {"output": pair.expected}
        where = f"metric {self.spec}: record {pair.number}"
        try:
            value = float(self.function(answer, pair.expected, record))
        except Exception as error:  # whatever another's code raises
            raise UserError(
                f"{where}: {type(error).__name__}: {reason_of(error)}; mend the function and run "
                "the same command again, the answers are kept"
            ) from error
        if not abs(value) < float("inf"):
            raise UserError(f"{where}: gives {value}; a score is a finite number")
        return value


def load_metric(spec: str) -> Metric:
    """Import a metric, from the current folder or from what is installed.

    Raises:
        UserError: it cannot be imported, is no function of three arguments, or has the name of a
            score of ours.
    """
    module_name, colon, name = spec.partition(":")
    form = "give module:function, such as my_metrics:is_polite of my_metrics.py in this folder"
    if not (module_name and colon and name.isidentifier()):
        raise UserError(f"metric {spec}: {form}")
    if name in MEASURES:
        raise UserError(f"metric {spec}: {name} is a score of glmtune; give yours another name")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    leave_out_nothing()
    try:
        function = getattr(importlib.import_module(module_name), name, None)
    except Exception as error:
        raise UserError(
            f"metric {spec}: {module_name} cannot be imported ({type(error).__name__}: "
            f"{reason_of(error)}); {form}"
        ) from error
    if not callable(function):
        raise UserError(f"metric {spec}: {module_name} has no function {name}; {form}")
    try:
        inspect.signature(function).bind("", "", {})
    except TypeError as error:
        raise UserError(
            f"metric {spec}: {name} is called with answer, reference and record ({error}); write "
            f"def {name}(answer, reference, record)"
        ) from error
    except ValueError:  # one of another language's, which does not say what it takes
        pass
    return Metric(spec, function)
