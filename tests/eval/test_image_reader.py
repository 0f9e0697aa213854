"""Images read ahead in processes of their own: the same pixels, the same errors, in whatever order they are asked for."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_eval_shard import checkpoints, data, order, rows_of, said  # noqa: F401 (fixtures)
from tiny_checkpoints import build_reference, make_image, save_llava_hf

from llava.eval import run_llava
from llava.eval.runs.answer_shard import ShardAnswerer
from llava.eval.runs.image_reader import ImageFiles, ImageReader, UnreadableImage, read_image
from llava.inference.loaded_checkpoint import LoadedCheckpoint
from llava.model.builder import load_pretrained_model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    names = [f"{n}.png" for n in range(5)]
    for n, name in enumerate(names):
        make_image(40 + 9 * n, 70 - 8 * n, seed=n).save(folder / name)
    (folder / "2.png").write_bytes(b"no image")
    checkpoint = save_llava_hf(build_reference("llava_next"), tmp_path_factory.mktemp("checkpoint"))
    _, model, processor, _ = load_pretrained_model(checkpoint, device_map="cpu")
    files = ImageFiles(folder, names, processor, model.config, "official")
    files.checkpoint = checkpoint
    return files


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_asked_for_is_what_comes(files, workers):
    reader = ImageReader(files, workers)
    for name in ("1.png", "0.png", "4.png", "0.png"):  # out of order, and once more
        image, plain = reader.get(name), files.read(name)
        assert torch.equal(image.pixels, plain.pixels) and image.size == plain.size
    with pytest.raises(UnreadableImage, match="UnidentifiedImageError"):
        reader.get("2.png")
    assert reader.get("3.png").size == files.read("3.png").size


def test_an_image_that_is_asked_for_again_reads_no_others(files):
    """A batch that ran out of memory asks for its images again."""
    reader = ImageReader(files, 1)
    for _ in range(3):
        reader.get("0.png")
    assert not reader._waiting


def test_answers_are_those_of_reading_at_once(checkpoints, data, tmp_path):  # noqa: F811
    rows = []
    for workers in (0, 2):
        spec = order(checkpoints["original"], data, tmp_path / str(workers), 3, method="adav", overall_tokens=9)
        rows.append(rows_of(ShardAnswerer(spec, image_workers=workers), spec))
    assert said(rows[0]) == said(rows[1]) and len(rows[0]) == 7


def test_run_llava_sees_as_a_person_and_an_evaluation_as_llava(files, tmp_path, monkeypatch, capsys):
    """A transparent photo that lies on its side."""
    path, exif = tmp_path / "photo.png", Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (50, 30), (0, 0, 0, 0)).save(path, exif=exif)
    assert read_image(path).size == (50, 30) and not np.asarray(read_image(path)).any()
    seen = []
    pixels = LoadedCheckpoint.pixels
    monkeypatch.setattr(
        LoadedCheckpoint, "pixels", lambda self, image, config: seen.append(image) or pixels(self, image, config)
    )
    flags = [
        "--model-path",
        str(files.checkpoint),
        "--image-file",
        str(path),
        "--query",
        "Why?",
        "--max_new_tokens",
        "1",
    ]
    run_llava.main(flags)
    (image,) = seen
    assert image.size == (30, 50) and (np.asarray(image) == 255).all()
