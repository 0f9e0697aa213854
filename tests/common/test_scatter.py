"""When the repeats of a time differ too much for it to be quoted, and what the evaluation says then."""

import pytest

from llava.common.scatter import REASON, scatters, spread
from llava.eval.runs.describe import describe_run
from llava.eval.runs.run_summary import summarise


@pytest.mark.parametrize(
    "repeats, expected, marked",
    [
        ([25.0, 25.3, 24.9, 26.0, 25.1], 0.3 / 25.1, False),
        ([25.0, 25.0, 25.0, 25.0, 1283.0], 0.0, False),  # one slow repeat does not move the median
        ([25.0, 41.0, 173.0, 90.0, 29.0], 61 / 41, True),
        ([400.0, 1283.0, 900.0], 441.5 / 900, True),
        ([20.0, 24.0], 2 / 22, False),
        ([7.0], 0.0, False),
        ([], 0.0, False),
        ([0.0, 0.0, 0.0], 0.0, False),
    ],
)
def test_what_scatters(repeats, expected, marked):
    assert spread(repeats) == pytest.approx(expected)
    assert spread([1e-3 * one for one in repeats]) == pytest.approx(expected), "in any unit"
    assert scatters(spread(repeats)) is marked


def rows(batches):
    """Rows of a run, by batch: (prefill seconds of each of its questions, questions)."""
    common = {"total": [16], "kept": [4], "new_tokens": 1, "conversation": "plain", "prefill_flops": 100}
    common |= dict.fromkeys(("kv_bytes_live", "kv_bytes_allocated", "kv_bytes_predicted"), 8)
    return [common | {"seconds": {"prefill": seconds, "decode": 1.0}} for seconds, n in batches for _ in range(n)]


def test_a_run_says_how_much_its_batches_scatter():
    calm = [(0.010 + 0.0001 * n, 4) for n in range(9)]
    assert summarise(rows([(0.9, 4), *calm]))["prefill_spread"] == pytest.approx(0.045, abs=0.002)
    busy = [(0.010 * (1 + n % 4), 4) for n in range(12)]
    assert (
        summarise(rows([(seconds + 1e-6 * n, size) for n, (seconds, size) in enumerate(busy)]))["prefill_spread"] > 0.5
    )
    assert summarise(rows(calm[:7]))["prefill_spread"] is None, "too few to tell"


def test_more_work_is_no_scatter():
    """Time is told per predicted FLOP: a run whose questions differ in length does not scatter."""
    mixed = rows([(0.01 * (1 + n % 3) + 1e-7 * n, 2) for n in range(12)])
    for n, row in enumerate(mixed):
        row["prefill_flops"] = 100 * (1 + n // 2 % 3)
    assert summarise(mixed)["prefill_spread"] < 0.01


@pytest.mark.parametrize("share, said", [(0.6, True), (0.3, False), (None, False)])
def test_the_launcher_says_so(share, said):
    class Named:
        name, split, short_name, method, points = "gqa", "test", "tiny", "adav", False

    class Run:
        benchmark = checkpoint = config = Named
        folder = "runs/x"

    report = summarise(rows([(0.01, 4)])) | {"score": {"accuracy": 0.5}, "prefill_spread": share}
    report["sessions"] = [{"answered": 4, "reused": 0, "wall_seconds": 1.0}]
    assert (f"note: the time per question scatters: {REASON}" in describe_run(Run, report)) is said
