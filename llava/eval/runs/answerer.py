"""Answerer: the loop of a worker over the samples of a work order, whatever engine answers them. Imports no torch."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence

from llava.eval.runs.shard_answers import AnswerFile
from llava.eval.runs.work_order import OrderedSample, WorkOrder


class Answerer(ABC):
    """Answers the samples of one work order after another, in batches.

    Each finished batch is appended to the answer file at once, so an interruption loses one batch at most.
    """

    @abstractmethod
    def begin(self, order: WorkOrder) -> None:
        """Get ready for the samples of `order`; nothing that was kept for an earlier order may be used for them."""

    @abstractmethod
    def answer_next(self, samples: Sequence[OrderedSample], order: WorkOrder) -> list[dict]:
        """Answer the first of `samples`, at least one; return one row for each that was answered.

        samples: what is still to do. A row has the answer and its measurements, or the error of an unreadable image.
        """

    def run(self, order: WorkOrder, stopping: threading.Event) -> None:
        """Answer the samples of `order` and append the rows to its answer file, until done or `stopping` is set."""
        self.begin(order)
        answers, samples = AnswerFile(order.answers), order.samples
        while samples and not stopping.is_set():
            rows = self.answer_next(samples, order)
            answers.append(rows)
            samples = samples[len(rows) :]
        answers.close()
