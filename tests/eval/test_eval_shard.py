"""A loaded checkpoint that answers a work order: batches, formats, measurements, running out of memory; devices of shards."""

import json
import threading
from dataclasses import replace

import pytest
import torch
from eval_data import make_vqav2
from PIL import Image
from tiny_checkpoints import build_reference, save_clip_tower, save_llava_hf, save_original

from llava.common.errors import UserError
from llava.common.find_checkpoint import find_checkpoint
from llava.config import AdaVConfig
from llava.eval.benchmarks import BENCHMARKS
from llava.eval.runs import answer_shard as loaded_shard
from llava.eval.runs import worker_processes as shards
from llava.eval.runs.answer_shard import ShardAnswerer
from llava.eval.runs.image_reader import ImageFiles, ImageReader
from llava.eval.runs.run import Run
from llava.eval.runs.work_order import Generation, OrderedSample, WorkOrder
from llava.methods.before_llm import ImageTokens
from llava.model.encoded_images import RECORD_BYTES, EncodedImage, RecentImages
from llava.model.llava_arch import StageClock


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_vqav2(tmp_path_factory.mktemp("data"), 7, images=4)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    model = build_reference("llava_next")
    original = save_original(model, folder / "original", save_clip_tower(model, folder / "tower"))
    return {"original": original, "llava-hf": save_llava_hf(model, folder / "hf")}


def order(checkpoint, data, output, batch_size=4, **configuration) -> WorkOrder:
    """The work order of a whole run on one shard."""
    found = find_checkpoint(str(checkpoint))
    run = Run(BENCHMARKS["vqav2"](data, found), AdaVConfig(**configuration), found, Generation(12), output)
    run.shards.mkdir(parents=True, exist_ok=True)
    return replace(run.order(0, run.samples, batch_size), answers=output / f"answers-{batch_size}.jsonl")


def rows_of(shard: ShardAnswerer, spec: WorkOrder) -> list[dict]:
    shard.run(spec, threading.Event())
    with open(spec.answers) as file:
        return [json.loads(line) for line in file]


def said(rows: list[dict]) -> list[tuple]:
    """What must not depend on the batch."""
    names = ("key", "answer", "total", "kept", "new_tokens", "kv_bytes_live", "kv_bytes_predicted", "conversation")
    names += ("prefill_flops", "layer_mean")
    return [tuple(row[name] for name in names) for row in rows]


@pytest.mark.parametrize(
    "kind, method",
    [
        ("original", "none"),
        ("original", "random"),
        ("original", "adav"),
        ("original", "no_image"),
        ("llava-hf", "adav"),
    ],
)
def test_answers_do_not_depend_on_the_batch(checkpoints, data, tmp_path, kind, method):
    specs = [order(checkpoints[kind], data, tmp_path, size, method=method, overall_tokens=9) for size in (1, 3, 7)]
    shard = ShardAnswerer(specs[0])
    alone, three, all_at_once = (rows_of(shard, spec) for spec in specs)
    assert said(alone) == said(three) == said(all_at_once) and len(alone) == 7
    assert [row["key"] for row in alone] == [list(sample.key) for sample in specs[0].samples]
    kept = {tuple(row["kept"]) for row in alone[:-1]}
    assert (
        kept == {(9,)} if method in ("random", "adav") else kept == {(0,)} if method == "no_image" else min(kept) > (9,)
    )
    assert alone[-1]["kept"] == [], "the last question has no image"
    assert all(row["layer_mean"] == row["kept"] for row in alone)
    assert min(row["prefill_flops"] for row in alone[:-1]) > alone[-1]["prefill_flops"] > 0
    assert all(row["kv_bytes_live"] == row["kv_bytes_predicted"] for row in alone)
    # Room for the 11 tokens that 12 new ones may feed back; whoever ends earlier leaves some of it unused.
    unused = [12 - row["new_tokens"] for row in alone]
    entry = shard.shape.layers * shard.shape.kv_entry(4)
    assert [row["kv_bytes_allocated"] - row["kv_bytes_live"] for row in alone] == [n * entry for n in unused]
    assert all(row["kv_bytes_allocated"] >= row["kv_bytes_live"] for row in all_at_once)


@pytest.mark.filterwarnings("ignore:no FitPrune table was fitted")
@pytest.mark.parametrize(
    "method, options",
    [
        ("none", {}),
        ("adav", {}),
        ("adav", {"compat": "public", "anyres": "fastervlm"}),
        ("visionzip", {}),
        ("scope", {}),
        ("mmtok", {}),
        ("prunesid", {"compat": "public"}),
        ("random", {}),
        ("fastv", {}),
        ("no_image", {}),
    ],
)
def test_an_image_is_encoded_once_for_all_of_its_questions(checkpoints, data, tmp_path, monkeypatch, method, options):
    """Seven questions about three images, in batches that an image straddles: the same as each for itself."""
    config = {"method": method, "overall_tokens": 12, "options": options}
    spec = order(checkpoints["original"], data, tmp_path, 4, **config)
    names = [sample.images for sample in spec.samples[:3]]
    samples = tuple(sample._replace(images=names[n * 3 // 7]) for n, sample in enumerate(spec.samples))
    spec = replace(spec, samples=samples)
    alone = replace(spec, batch_size=1, answers=tmp_path / "alone.jsonl")
    shard = ShardAnswerer(spec)
    tiles, read = [], []
    shard.model.get_vision_tower().register_forward_pre_hook(lambda _, inputs: tiles.append(len(inputs[0])))
    shard.image_processor = counted(shard.image_processor, read)
    together = said(rows_of(shard, spec))
    once, decoded = sum(tiles), len(read)
    assert len(shard.recent) == 3
    tiles.clear(), read.clear()
    monkeypatch.setattr(loaded_shard, "RECENT_BYTES", 0)  # nothing is kept from one batch to the next
    assert said(rows_of(shard, alone)) == together and len(shard.recent) == 0
    if method == "no_image":
        assert once == sum(tiles) == 0
    else:
        assert once < sum(tiles) and len(tiles) == 7
    assert decoded * 7 == len(read) * 3, "each image is cut into tiles once"


def counted(processor, calls: list):
    """The image processor, noting each image that comes through it (one call per image under anyres)."""

    class Counted(type(processor)):
        def __call__(self, images, **kwargs):
            calls.append(len(images))
            return super().__call__(images, **kwargs)

    made = Counted(**processor.to_dict())
    return made


def test_embedded_prompts_do_not_depend_on_sharing(checkpoints, data, tmp_path):
    spec = order(checkpoints["original"], data, tmp_path, method="adav", overall_tokens=9)
    shard, config = ShardAnswerer(spec), spec.config
    prompts = [sample.prompt for sample in spec.samples]
    picture = Image.effect_noise((60, 90), 80).convert("RGB")
    (encoded,) = shard.encode([shard.pixels(picture, config)], config)
    shared = shard.splice(prompts, [[encoded]] * len(prompts), config)
    apart = shard.prepare(prompts, [picture] * len(prompts), config)
    assert torch.equal(shared.attention_mask, apart.attention_mask)
    torch.testing.assert_close(shared.inputs_embeds, apart.inputs_embeds, rtol=0, atol=1e-6)
    for ours, theirs in zip(shared.selections, apart.selections, strict=True):
        assert torch.equal(ours[0].indices, theirs[0].indices)


def test_recent_images_are_bounded_in_bytes():
    def image(n):
        rows = torch.zeros(n, dtype=torch.long)
        tokens = ImageTokens(torch.zeros(n, 4), torch.zeros(n), rows, rows.clone(), rows.clone())
        return EncodedImage(None, tokens)

    size = image(10).nbytes
    assert size == RECORD_BYTES + 10 * (4 * 4 + 4 + 3 * 8)
    recent = RecentImages(2 * size)
    for name in "abc":
        recent.put(name, image(10))
        assert recent.nbytes <= recent.capacity
    assert recent.get("a") is None and recent.get("b") is not None
    recent.put("d", image(10))
    assert recent.get("c") is None and recent.get("b") is not None, "the least recently used one goes"
    recent.put("huge", image(100))
    assert recent.get("huge") is None and len(recent) == 2, "one that does not fit drives out no other"
    recent.put("b", image(3))
    assert recent.nbytes == size + image(3).nbytes


def test_a_picture_that_changed_is_encoded_anew(checkpoints, data, tmp_path):
    spec = order(checkpoints["original"], data, tmp_path, 1, method="cls", overall_tokens=9)
    shard, config, folder = ShardAnswerer(spec), spec.config, tmp_path / "images"
    folder.mkdir()

    def encode(config):
        order = replace(spec, image_folder=folder, config=config, samples=(OrderedSample(("a",), ("a.png",), ""),))
        reader = ImageReader(ImageFiles.from_order(order, shard), 0)
        return shard._encoded(["a.png"], folder, reader, config, StageClock(shard.device))

    for n, size in enumerate(((40, 40), (90, 30))):
        Image.effect_noise(size, 80).convert("RGB").save(folder / "a.png")
        encoded, errors = encode(config)
        assert not errors and encoded["a.png"].plan.image_size == size and len(shard.recent) == n + 1
    encode(config)
    assert len(shard.recent) == 2
    other = config.replaced(options={"anyres": "fastervlm"})
    encode(other)
    assert len(shard.recent) == 3, "another preprocessing"


def test_sampled_answers_depend_on_their_seed_and_on_nothing_else(checkpoints, data, tmp_path):
    spec = order(checkpoints["original"], data, tmp_path, 4, method="adav", overall_tokens=9)
    drawn = replace(spec, generation=replace(spec.generation, temperature=5.0, seed=1))
    shard = ShardAnswerer(drawn)

    def answers(name, samples=drawn.samples, **changes):
        generation = replace(drawn.generation, **changes)
        answers = tmp_path / f"{name}.jsonl"
        rows = rows_of(shard, replace(drawn, answers=answers, samples=samples, generation=generation))
        return {tuple(row["key"]): row["answer"] for row in rows}

    first = answers("first")
    assert first == answers("backwards", samples=drawn.samples[::-1])
    assert first != answers("seed", seed=2) and first != answers("greedy", temperature=0.0)


def test_out_of_memory_halves_the_batch(checkpoints, data, tmp_path, monkeypatch):
    spec = order(checkpoints["original"], data, tmp_path, 7)
    shard = ShardAnswerer(spec)
    whole, room, tried = shard.answer, 2, []

    def answer(samples, *rest):
        tried.append(len(samples))
        if len(samples) > room:
            raise torch.OutOfMemoryError
        return whole(samples, *rest)

    monkeypatch.setattr(shard, "answer", answer)
    assert len(rows_of(shard, spec)) == 7 and tried == [7, 4, 2, 2, 2, 1]
    room = 0
    with pytest.raises(UserError, match="too little memory for one sample"):
        shard.run(spec, threading.Event())


def test_a_stopped_shard_finishes_its_batch(checkpoints, data, tmp_path, monkeypatch):
    spec = order(checkpoints["original"], data, tmp_path, 2)
    shard, stopping = ShardAnswerer(spec), threading.Event()
    whole = shard.answer
    monkeypatch.setattr(shard, "answer", lambda *args: stopping.set() or whole(*args))
    shard.run(spec, stopping)
    with open(spec.answers) as file:
        assert len(file.readlines()) == 2


@pytest.mark.parametrize(
    "visible, per_model, groups",
    [
        ("0,1,2,3", 1, ["0", "1", "2", "3"]),
        ("0, 1,2,3", 2, ["0,1", "2,3"]),
        ("GPU-abc,GPU-def", 1, ["GPU-abc", "GPU-def"]),
        ("", 1, []),
        ("-1", 1, []),
        ("2,-1,3", 1, ["2"]),
        (None, 1, ["0"]),
    ],
)
def test_devices(monkeypatch, visible, per_model, groups):
    monkeypatch.setattr(shards, "gpus", lambda: ["GPU 0: made up", "GPU 1: made up"])
    monkeypatch.setattr(shards, "torch_is_for_cpu", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert shards.device_groups(per_model) == groups


def test_idle_devices_are_told(monkeypatch, capsys):
    monkeypatch.setattr(shards, "gpus", lambda: ["GPU 0: made up", "GPU 1: made up", "GPU 2: made up"])
    monkeypatch.setattr(shards, "torch_is_for_cpu", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert shards.device_groups() == ["0"]
    assert capsys.readouterr().err == "note: 2 of 3 GPUs stand idle; CUDA_VISIBLE_DEVICES=0,1,2 uses all of them\n"
    assert shards.device_groups(every=True) == ["0", "1", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert shards.device_groups() == ["1"]
    assert capsys.readouterr().err == ""


def test_devices_that_do_not_divide(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(UserError, match="names 3 devices, allowed is a multiple of the 2 per model"):
        shards.device_groups(2)
