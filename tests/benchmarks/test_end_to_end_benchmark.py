"""benchmarks/end_to_end.py on its smallest preset: who has rows, what gets none, and the arithmetic of the ceiling."""

import csv
import dataclasses
import weakref

import end_to_end
import end_to_end_bench
import pytest
import torch
from end_to_end import read_config, rows_of
from end_to_end_bench import Bench, Entry
from end_to_end_report import read_rows, show
from memory import Peak, _products, bare_step, ceiling, copy_bandwidth, decode_weight_bytes, read_bandwidth, step_bytes
from page import put
from providers import Models, Ours, OursByEngine, Transformers, Upstream
from shapes import PRESETS, Prompts, random_model

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.integrations.transformers.reference import share_weights
from llava.model.decoding.decode_step import merge_projections

ADAV, CLS, ALL = AdaVConfig(overall_tokens=8), AdaVConfig(method="cls", overall_tokens=8), AdaVConfig(method="none")


@pytest.fixture
def known_bandwidth(monkeypatch):
    """Both bandwidths are given instead of measured, which takes seconds each."""
    for name in ("copy_bandwidth", "read_bandwidth"):
        monkeypatch.setattr(end_to_end_bench, name, lambda _: 1e10)


@pytest.fixture
def bench(known_bandwidth):
    def make(config, providers=("transformers", "upstream", "ours"), dtype=torch.float32):
        configs = {"it": config}
        return Bench(PRESETS["tiny"], None, "cpu", dtype, 0, providers, configs)

    return make


def test_every_provider_has_its_row(tmp_path, capsys, known_bandwidth):
    output, plot, document = tmp_path / "results" / "e.csv", tmp_path / "e.png", tmp_path / "performance.md"
    texts = ("method=none", "method=adav overall_tokens=8", "FastV: method=fastv overall_tokens=20")
    configs = [part for text in texts for part in ("--config", text)]
    end_to_end.main(
        ["--preset", "tiny", "--device", "cpu", "--repeats", "2", "--batches", "2", "--new-tokens", "1", "4"]
        + ["--output", str(output), "--plot", str(plot)]
        + configs
    )
    rows = list(csv.DictReader(output.open()))
    cell = [
        ("transformers", "all tokens"),
        ("ours", "none"),
        ("engine", "none"),
        ("upstream", "adav 8"),
        ("ours", "adav 8"),
        ("engine", "adav 8"),
        ("ours", "FastV"),
        ("engine", "FastV"),
    ]
    assert rows[6]["config"] == "method=fastv overall_tokens=20"
    assert [(row["provider"], row["name"]) for row in rows] == cell * 2
    assert [(row["batch"], row["new_tokens"]) for row in rows[::8]] == [("2", "1"), ("2", "4")]
    for row in rows:
        # 5 tiles of 16 patches, and a newline token for each of the 8 rows of the merged crops.
        assert row["vision_tokens"] == "88" and row["text_tokens"] == "12"
        parts = [float(row[f"{stage}_ms"]) for stage in ("vision_tower", "projector", "selection", "prefill")]
        assert min(parts) >= 0 and float(row["ttft_ms_min"]) <= float(row["ttft_ms"]) <= float(row["ttft_ms_max"])
        assert (row["tokens_per_s"] == "") == (row["new_tokens"] == "1")
        assert row["at_once"] == ("1" if row["provider"] == "upstream" else row["batch"])
        assert row["new_tokens"] == "1" or float(row["copy_gb_per_s"]) == 10
        assert row["torch"] and row["device"] and row["command"].startswith("python benchmarks/end_to_end.py")
        ours = row["provider"] in ("ours", "engine")
        compared = {"none": "transformers", "adav 8": "upstream"} if ours else {}
        assert row["compared_with"] == compared.get(row["name"], "")
        if row["compared_with"]:
            assert row["same_tokens"] == "1.0"
    # 4 layers, 48 numbers of keys and of values, 4 bytes each; three of four new tokens are fed back, two rows.
    entry, last = 2 * 4 * 2 * 48 * 4, rows[8:]
    assert float(last[0]["kv_mb"]) == round(entry * (100 + 3) / 1e6, 2)
    assert float(last[4]["kv_mb"]) == round(entry * (20 + 3) / 1e6, 2)
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "a copy moves" in printed and "adav 8" in printed

    document.write_text("Before.\n\n<!-- e -->\nold\n<!-- end of e -->\n\nAfter.\n")
    for _ in range(2):  # the second time replaces the first
        end_to_end.main(["--table", str(output), "--document", str(document)])
    text = document.read_text()
    assert text.startswith("Before.") and text.endswith("After.\n") and "old" not in text
    assert text.count("| transformers ") == 2 and text.count("| 2 x 1 ") == 2 and text.count("(e.png)") == 1


def test_half_precision_is_checked_by_a_float32_twin(tmp_path, known_bandwidth):
    output = tmp_path / "e.csv"
    flags = ["--preset", "tiny", "--device", "cpu", "--repeats", "1", "--batches", "1", "--dtype", "bfloat16"]
    end_to_end.main([*flags, "--output", str(output), "--plot", str(tmp_path / "e.png")])
    rows = read_rows(output)
    assert [row["provider"] for row in rows] == ["transformers", "ours", "engine", "upstream", "ours", "engine"]
    assert rows[0]["kv_mb"] == round(4 * 2 * 48 * 2 * 103 / 1e6, 2)


def test_a_wrong_answer_gets_no_row(tmp_path, bench, monkeypatch):
    """Our head is made another one than transformers': everything of ours that is compared is refused, and named."""
    build = end_to_end_bench.random_model

    def with_wrong_reference(*args):
        model = build(*args)
        reference = share_weights(model)
        reference.lm_head.weight = torch.nn.Parameter(reference.lm_head.weight + 0.01)
        reference.generation_config = model.generation_config
        monkeypatch.setattr(Models, "transformers", reference)
        return model

    monkeypatch.setattr(end_to_end_bench, "random_model", with_wrong_reference)
    output = tmp_path / "e.csv"
    flags = ["--preset", "tiny", "--device", "cpu", "--repeats", "1", "--batches", "1", "--new-tokens", "2"]
    with pytest.raises(SystemExit, match=r"ours \(none\): its logits are up to .*gets no time"):
        end_to_end.main([*flags, "--output", str(output), "--plot", str(tmp_path / "e.png")])
    assert [row["provider"] for row in read_rows(output)] == ["transformers", "upstream"]


def test_other_tokens_than_the_published_way_keeps(bench):
    made = bench(ADAV)
    entry = next(entry for entry in made.entries if entry.provider.name == "ours")
    entry.provider = Ours(made.models, CLS)
    right, complaints = made.right(made.prompts(2), 2)
    assert complaints == ["ours (it): it keeps other vision tokens than upstream, so it gets no time"]
    assert [entry.provider.name for entry in right] == ["transformers", "upstream"]


class OneMore(Ours):
    """Keeps one token more than its configuration says."""

    def answer(self, prompts, new_tokens, logits=False):
        more = dataclasses.replace(self.config, overall_tokens=self.config.overall_tokens + 1)
        return Ours(self.models, more).answer(prompts, new_tokens, logits)


def test_a_cache_of_another_size(bench):
    made = bench(ADAV, providers=("ours",))
    made.entries = [Entry(OneMore(made.models, ADAV), "it", None)]
    right, (complaint,) = made.right(made.prompts(1), 3)
    assert not right and "its KV cache has 35,328 bytes, expected are 33,792" in complaint


def test_logits_that_are_not_finite(bench):
    made = bench(ALL)
    made.models.ours.lm_head.weight.data[3] = float("inf")
    right, complaints = made.right(made.prompts(1), 2)
    assert not right and len(complaints) == 2 and all("not finite" in complaint for complaint in complaints)


def test_a_repetition_with_other_tokens(bench):
    made = bench(ALL, providers=("ours",))
    prompts = made.prompts(1)
    right, complaints = made.right(prompts, 3)
    assert len(right) == 1 and not complaints
    made.models.ours.lm_head.weight.data.neg_()
    complaints = made.measure(right, prompts, 3, repeats=2)
    assert not right and complaints == ["ours (it): its answer after the check gave other tokens, so it gets no time"]


FLAGS = [
    "--preset",
    "tiny",
    "--device",
    "cpu",
    "--repeats",
    "1",
    "--new-tokens",
    "3",
    "--config",
    "method=adav overall_tokens=8",
]


@pytest.fixture
def measured(tmp_path, known_bandwidth):
    """Run the benchmark on the tiny preset with some flags, and give the rows it wrote."""

    def run(*flags):
        output = tmp_path / "e.csv"
        end_to_end.main([*FLAGS, "--output", str(output), "--plot", str(tmp_path / "e.png"), *flags])
        return read_rows(output)

    run.output = tmp_path / "e.csv"
    return run


@pytest.fixture
def compared(monkeypatch):
    """How many rows the answers of each check had."""
    rows, right = [], Bench.right

    def record(bench, prompts, *others):
        rows.append(len(prompts.ids))
        return right(bench, prompts, *others)

    monkeypatch.setattr(Bench, "right", record)
    return rows


def test_quick(measured, compared):
    args, _ = end_to_end.arguments(["--quick", "--preset", "llava-v1.6-vicuna-7b", "--device", "cpu"])
    assert (args.batches, args.new_tokens, args.repeats, args.check_batch) == ([1, 8, 32], [64], 3, 2)
    rows = measured("--quick", "--batches", "1", "3", "4")
    cell = ["transformers", "ours", "engine"]
    timed = {batch: [row["provider"] for row in rows if row["batch"] == batch] for batch in (1, 3, 4)}
    assert timed == {1: ["transformers", "upstream", "ours", "engine"], 3: cell, 4: cell}
    assert {row["new_tokens"] for row in rows} == {3} and {row["repeats"] for row in rows} == {1}, "flags go first"
    assert compared == [1, 2], "each comparison once, on two rows where there are more"
    assert {row["compared_with"] for row in rows if row["provider"] == "ours"} == {"upstream"}


def test_comparing_on_fewer_rows(measured, compared):
    rows = measured("--batches", "3", "--check-batch", "1", "--providers", "ours", "upstream")
    assert compared == [1] and [(row["provider"], row["batch"]) for row in rows] == [("upstream", 3), ("ours", 3)]


def test_a_slow_reference_that_nobody_asked_for(measured, compared):
    rows = measured("--batches", "3", "--providers", "ours")
    assert compared == [2] and [row["compared_with"] for row in rows] == ["upstream"]
    measured("--batches", "3", "--providers", "ours", "upstream")
    assert compared == [2, 3]


def test_without_a_twin(measured, monkeypatch):
    monkeypatch.setattr(end_to_end, "twin_complaints", lambda *_: pytest.fail("no twin was asked for"))
    rows = measured("--batches", "1", "--dtype", "bfloat16", "--no-twin", "--providers", "ours")
    assert [row["dtype"] for row in rows] == ["bfloat16"]


def test_adding_to_a_file(measured, tmp_path):
    first = measured("--batches", "2", "--providers", "transformers", "ours", "--append")
    second = measured("--batches", "1", "2", "--providers", "engine", "ours", "--append")
    assert [(row["provider"], row["batch"]) for row in second] == [
        *(("ours", 1), ("engine", 1)),
        *(("transformers", 2), ("ours", 2), ("engine", 2)),
    ]
    plain, again, engine = second[2:]
    assert plain == first[0], "what was not measured again stays"
    assert again["command"] != first[1]["command"] and again["command"] == engine["command"]
    assert engine["ttft_speedup"] == pytest.approx(plain["ttft_ms"] / engine["ttft_ms"], rel=2e-2, abs=1e-3)
    assert second[0]["ttft_speedup"] is None, "transformers was not measured at batch 1"
    assert len(measured("--batches", "1", "--providers", "ours")) == 1, "without --append the file is replaced"


def test_adding_to_a_file_of_something_else(measured, tmp_path, capsys):
    (tmp_path / "e.csv").write_text("ttft_ms,preset,dtype\n1,cpu,float32\n")
    with pytest.raises(SystemExit):
        measured("--append")
    assert '--append found rows with preset "cpu", allowed is "tiny", as now' in capsys.readouterr().err


@pytest.mark.parametrize("when", ["check", "warm-up", "second repetition"])
def test_a_provider_that_runs_out_of_memory(when, measured, monkeypatch, tmp_path):
    """It has a row that says so, what is kept is released when its tensors are gone, and the others are measured."""
    answers, released, answer = [], [], OursByEngine.answer
    fails = {"check": 1, "warm-up": 2, "second repetition": 4}[when]

    class Large:
        """Stands for the tensors of an attempt; of weak references."""

    def runs_out(provider, *args, **options):
        answers.append(1)
        large = Large()
        if len(answers) == fails:
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(provider, *args, **options)

    held: list = []
    monkeypatch.setattr(OursByEngine, "answer", runs_out)
    monkeypatch.setattr(OursByEngine, "release", lambda _: released.append([one() for one in held]))
    rows = measured("--batches", "2", "--repeats", "2", "--providers", "transformers", "ours", "engine")
    assert [(row["provider"], row["status"]) for row in rows] == [
        ("transformers", "measured"),
        ("ours", "measured"),
        ("engine", "out of memory"),
    ]
    last = rows[-1]
    assert len(answers) == fails
    assert {tuple(one) for one in released if one} == {(None,)}, "its tensors are gone whenever memory is released"
    assert {last[name] for name in end_to_end.FIGURES} == {None} and last["batch"] == 2 and rows[1]["ttft_ms"] > 0
    assert (tmp_path / "e.png").read_bytes().startswith(b"\x89PNG")
    assert "engine" in show(rows).splitlines()[-1] and "out of memory" in show(rows).splitlines()[-1]


def test_a_reference_that_runs_out_of_memory(bench, monkeypatch):
    def runs_out(*_, **__):
        raise torch.OutOfMemoryError

    made = bench(ADAV, providers=("ours",))
    monkeypatch.setattr(Upstream, "answer", runs_out)
    right, (complaint,) = made.right(made.prompts(1), 2)
    assert not right and "upstream, which it is compared with, runs out of memory (--check-batch" in complaint


def test_everyone_answers_twice_before_being_timed(bench, monkeypatch):
    made, calls, answer = bench(ALL, providers=("ours",)), [], Ours.answer
    monkeypatch.setattr(Ours, "answer", lambda *args, **options: calls.append(1) or answer(*args, **options))
    prompts = made.prompts(1)
    right, _ = made.right(prompts, 2)
    made.measure(right, prompts, 2, repeats=3)
    assert len(calls) == 2 + 3 and len(right[0].answers) == 3


def test_on_a_gpu_one_after_another(bench, monkeypatch):
    """Each has the memory to itself: two answers more, its repetitions, and what it keeps is released before the next."""
    made, events = bench(ALL, providers=("ours", "engine")), []
    prompts = made.prompts(1)
    right, _ = made.right(prompts, 2)
    for kind in (Ours, OursByEngine):
        answer = kind.answer
        monkeypatch.setattr(kind, "answer", lambda who, *a, f=answer, **o: events.append(who.name) or f(who, *a, **o))
        monkeypatch.setattr(kind, "release", lambda who: events.append(f"release {who.name}"))
    for name in ("copy_bandwidth", "read_bandwidth", "free_memory"):
        monkeypatch.setattr(end_to_end_bench, name, lambda _, name=name: events.append(name) or 1e10)
    monkeypatch.setattr(end_to_end_bench, "Peak", lambda _: Peak("cpu"))
    made.device = "cuda"
    groups = made.groups(right)
    assert [made.measure(group, prompts, 2, repeats=3) for group in groups] == [[], []]
    bandwidth = ["copy_bandwidth", "read_bandwidth", "free_memory"]
    release = ["release ours", "release engine", "free_memory"]
    assert events == [*bandwidth, *["ours"] * 5, *release, *bandwidth, *["engine"] * 5, *release]
    assert [len(entry.answers) for (entry,) in groups] == [3, 3]


@pytest.mark.parametrize("when", ["check", "warm-up", "second repetition"])
def test_a_provider_that_fails(when, measured, monkeypatch, capsys):
    """It is named and has no row, its traceback is printed, and the others are measured."""
    answers, answer = [], OursByEngine.answer

    def fails(provider, *args, **options):
        answers.append(1)
        if len(answers) == {"check": 1, "warm-up": 2, "second repetition": 4}[when]:
            raise RuntimeError("CUDA error: misaligned address\nCompile with TORCH_USE_CUDA_DSA")
        return answer(provider, *args, **options)

    monkeypatch.setattr(OursByEngine, "answer", fails)
    said = r"engine \(adav 8\): it fails \(RuntimeError: CUDA error: misaligned address\), so it gets no time"
    with pytest.raises(SystemExit, match=said):
        measured("--batches", "2", "--repeats", "2", "--providers", "transformers", "ours", "engine")
    assert [row["provider"] for row in read_rows(measured.output)] == ["transformers", "ours"]
    assert "Traceback" in capsys.readouterr().err


def test_a_reference_that_fails(bench, monkeypatch):
    made = bench(ADAV, providers=("ours",))
    monkeypatch.setattr(Upstream, "answer", lambda *_, **__: 1 / 0)
    right, complaints = made.right(made.prompts(1), 2)
    assert not right and complaints == ["ours (it): upstream, which it is compared with, fails, so it gets no time"]


def test_rows_are_written_one_after_another_on_a_gpu(measured, monkeypatch):
    """A run that is cut off keeps what it measured; speeds of all its rows are set against one bandwidth."""
    bandwidths = iter((1e10, 2e10, 1.5e10))
    written: list[list[str]] = []
    write = end_to_end.write_csv
    monkeypatch.setattr(Bench, "groups", lambda _, entries: [[entry] for entry in entries])
    monkeypatch.setattr(end_to_end_bench, "copy_bandwidth", lambda _: next(bandwidths))
    monkeypatch.setattr(
        end_to_end, "write_csv", lambda f, rows: written.append([row["provider"] for row in rows]) or write(f, rows)
    )
    rows = measured("--batches", "2", "--providers", "transformers", "upstream", "ours")
    names = ["transformers", "upstream", "ours"]
    assert written == [names[:n] for n in (1, 2, 3)]
    assert {row["copy_gb_per_s"] for row in rows} == {20.0}


@torch.inference_mode()  # as providers answer in the benchmark
def test_near_ties_on_a_gpu(bench):
    """On a GPU one of a hundred kept tokens may be another one, and its row is then not compared; on a CPU none may."""
    made = bench(ADAV)
    entry = next(entry for entry in made.entries if entry.provider.name == "ours")
    prompts = made.prompts(2)
    made.right(prompts, 2)
    answer, truth = (provider.answer(prompts, 2, logits=True) for provider in (entry.provider, entry.reference))
    same, other = torch.arange(100), torch.arange(1, 101)

    def wrong(device, ours, theirs, row):
        made.device = device
        truth.kept, answer.kept = [same, same], [ours, theirs]
        moved = dataclasses.replace(answer, logits=answer.logits.clone())
        moved.logits[row] += 1.0
        return made._wrong(entry, moved, truth, prompts, 2)

    assert wrong("cuda", same, other, row=1) is None, "the row that read something else is not compared"
    assert "its logits are up to 1.0e+00" in wrong("cuda", same, other, row=0)
    assert wrong("cpu", same, other, row=1) == "it keeps other vision tokens than upstream"
    many = torch.arange(10, 110)
    assert wrong("cuda", same, many, row=1) == "it keeps other vision tokens than upstream"
    assert wrong("cuda", same, same.flip(0), row=1) == "it keeps other vision tokens than upstream"


def test_the_ceiling_by_hand():
    # Two layers, ten entries each after prefill, 4 bytes an entry; three rows, two steps, weights of 1,000 bytes. The
    # steps read 11 and 12 entries in each layer: 1,000 + 3 x 4 x (22 + 24) / 2 = 1,276 bytes in the mean.
    assert step_bytes(1000, [22 * 4, 24 * 4], batch=3) == 1276
    assert ceiling(1276, bandwidth=2552, batch=3) == 6  # two steps a second, three tokens each


def test_the_ceiling_of_a_row(bench):
    made = bench(ADAV, providers=("ours",))
    prompts = made.prompts(2)
    right, _ = made.right(prompts, 4)
    made.measure(right, prompts, 4, repeats=1)
    assert made.bandwidth == 1e10
    assert 0 < made.bare[2] < 1
    right[0].answers[0].decode, made.bandwidth, made.bare = 0.5, 1e9, {2: 0.1}
    (row,) = rows_of(right, made, prompts, 4)
    # 4 layers of 4 x 48 x 48 + 3 x 48 x 80 + 2 x 48 weights, the norm's 48, the head's 100 x 48.
    weights = 4 * (4 * (4 * 48 * 48 + 3 * 48 * 80 + 2 * 48) + 48 + 100 * 48)
    assert made.weights == weights
    # 8 + 12 tokens and the new ones: 21, 22 and 23 entries in each of 4 layers, 2 x 48 x 4 bytes, 2 rows.
    read = weights + 2 * 4 * 22 * 2 * 48 * 4
    assert row["mb_per_step"] == round(read / 1e6, 1)
    assert row["tokens_per_s"] == 12 and row["step_ms"] == round(1000 / 6, 3)  # 2 x 3 tokens in half a second
    assert row["overhead_ms"] == round(1000 / 6 - 100, 3)
    assert row["gb_per_s"] == round(6 * read / 1e9, 2)
    assert row["ceiling_tokens_per_s"] == round(2 * 1e9 / read, 2) and row["of_ceiling"] == round(6 * read / 1e9, 4)


def test_the_ceiling_of_an_adaptive_cache(bench):
    """A-VL, rate 0.5, compute_rate 0.89, interval 3, on 88 image tokens between 5 and 7 of text: 44 entries of the image
    are stored, 9 are the core, and every third step reads all 44. Steps read 5 + 9 + 8, 5 + 9 + 9 and 5 + 44 + 10."""
    name, config = read_config("method=none vision_adaptive_attention=true vision_adaptive_attention_compute_rate=0.89")
    assert name == "none + avl"
    made = bench(config, providers=("upstream", "ours"))
    prompts = made.prompts(2)
    right, complaints = made.right(prompts, 4)
    assert not complaints and right[0].reference.name == "transformers"
    assert not made.measure(right, prompts, 4, repeats=1)
    made.weights, made.bandwidth, right[0].answers[0].decode = 10**6, 1e9, 3.0
    (row,) = rows_of(right, made, prompts, 4)
    entry = 4 * 2 * 48 * 4  # of one token in all layers
    assert row["kv_mb"] == round(2 * (5 + 44 + 7 + 3) * entry / 1e6, 2)
    read = 10**6 + 2 * entry * (22 + 23 + 59) / 3
    assert row["mb_per_step"] == round(read / 1e6, 1) and row["tokens_per_s"] == 2
    assert row["ceiling_tokens_per_s"] == round(2e9 / read, 2) and row["of_ceiling"] == round(read / 1e9, 4)


@pytest.mark.parametrize("config", ["all_use_h2o=true method=none", "method=none prefill_filter_flag=true"])
def test_other_caches_have_the_predicted_size(bench, config):
    made = bench(read_config(config)[1], providers=("ours",))
    right, complaints = made.right(made.prompts(2), 4)
    assert len(right) == 1 and not complaints


@pytest.mark.parametrize(
    ("name", "patches", "gigabytes"),
    [("llava-v1.5-7b", 576, 13.21), ("llava-v1.6-vicuna-13b", 2880, 25.70), ("llava-v1.6-34b", 2880, 67.86)],
)
def test_real_shapes(name, patches, gigabytes):
    """Bytes of bfloat16 weights that a step reads: of 7B, what gpt-fast and torchao publish as Llama-2-7B's size."""
    config = PRESETS[name].model_config(newline=True)
    model = random_model(config, "meta", torch.bfloat16, seed=0)
    assert decode_weight_bytes(model) / 1e9 == pytest.approx(gigabytes, abs=0.01)
    prompts = Prompts.random(PRESETS[name], config, torch.empty(0), batch=1, seed=0)
    assert prompts.image.candidates == patches and prompts.image.newlines == (48 if patches > 576 else 0)


def test_products_of_a_step():
    """Weights that one input is multiplied with are one product where they lie behind one another, as in the engine."""
    model = random_model(PRESETS["tiny"].model_config(), "cpu", torch.float32, seed=0)
    apart = _products(model)
    assert len(apart) == 4 * 7 + 1 and sum(w.nbytes for w in apart) < decode_weight_bytes(model)
    merge_projections(model)
    joined = _products(model)
    assert len(joined) == 4 * 4 + 1
    assert torch.equal(joined[0], torch.cat(apart[:3])) and torch.equal(joined[-1], model.lm_head.weight)
    assert 0 < bare_step(model, 2) < 1


def test_bandwidths():
    assert copy_bandwidth("cpu") > 1e8 and read_bandwidth("cpu") > 1e8


def test_transformers_gets_our_tensors_and_a_whole_tower():
    model = random_model(PRESETS["tiny"].model_config(newline=True), "cpu", torch.float32, seed=0)
    reference = share_weights(model)
    ours = {value.data_ptr() for value in model.state_dict().values()}
    others = {name for name, value in reference.state_dict().items() if value.data_ptr() not in ours}
    assert all("post_layernorm" in name for name in others)
    assert len(model.get_vision_tower().vision_tower.encoder.layers) == 2
    assert len(reference.model.vision_tower.encoder.layers) == 3


def test_which_configurations_have_a_published_way():
    can = {name: Upstream.can(AdaVConfig(method=name)) for name in ("adav", "fastervlm", "none", "fastv", "visionzip")}
    assert can == {"adav": True, "fastervlm": True, "none": False, "fastv": False, "visionzip": False}
    assert not Upstream.side_by_side and Transformers.side_by_side and Ours.side_by_side


def test_names_of_configurations():
    for text, name in (
        ("method=none", "none"),
        ("method=no_image", "no_image"),
        ("method=adav overall_tokens=9 text_pruning_flag=true prefill_filter_flag=true", "adav 9 + avl + filter"),
        ("H2O: method=none all_use_h2o=true", "H2O"),
        ("""method=adav 'options={"positions": "original"}'""", "adav 144"),
    ):
        assert read_config(text)[0] == name
    assert read_config("""method=adav 'options={"positions": "original"}'""")[1].options == {"positions": "original"}


def test_the_peak_is_forgotten_between_answers():
    peak = Peak("cpu")
    if not peak.known:
        pytest.skip("this system does not let a process forget its peak")
    large = torch.ones(64 << 20)
    before, with_it = peak.bytes(), large.nbytes
    del large
    after = Peak("cpu").bytes()
    assert before >= with_it and after <= before - with_it // 2


def test_bad_arguments(tmp_path, capsys):
    for arguments, said in (
        (["--config", "method=adav tokens=3"], 'found "tokens=3", allowed is KEY=VALUE with a key of method,'),
        (["--config", "method=adav", "--config", "method=adav min=1"], 'found "min=1"'),
        (["--config", "method=adav", "--config", "method=adav options={}"], 'two configurations are called "adav 144"'),
        (["--config", "adav"], 'found "adav", allowed is KEY=VALUE'),
        (["--config", "method=adav overall_tokens=0"], '"overall_tokens" is 0, allowed is a whole number'),
        (["--batches", "0"], "--batches is 0, allowed is at least 1"),
        (["--layers", "-1"], "--layers is -1, allowed is at least 1"),
        (["--check-batch", "0"], "--check-batch is 0, allowed is at least 1"),
        (["--table", str(tmp_path / "none.csv")], "none.csv: cannot be read"),
    ):
        with pytest.raises(SystemExit) as stop:
            end_to_end.main(["--preset", "tiny", "--device", "cpu", *arguments])
        assert stop.value.code == 2 and said in capsys.readouterr().err
    other = tmp_path / "other.csv"
    other.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="found no rows with a column ttft_ms"):
        read_rows(other)
    document = tmp_path / "performance.md"
    document.write_text("no marks")
    with pytest.raises(UserError, match="found no one place for this table"):
        put(document, "e", "a table")
