"""Training of the demo checkpoints on a tiny model: every stage runs, the packed forward is the plain one, the files are right."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from llava.common.errors import UserError
from llava.shapes.captions import PROMPT, caption
from llava.shapes.dataset import scene_questions
from llava.shapes.scenes import draw_scene
from llava.shapes.tokenizer import build_tokenizer, vocabulary
from llava.shapes.training import data, run
from llava.shapes.training.batches import batches, image_embeddings, image_order, jittered_positions, sparse_order
from llava.shapes.training.checkpoint import load_demo_model
from llava.shapes.training.losses import Captioner, alignment_loss, caption_loss, lookup_loss
from llava.shapes.training.model import DemoModel
from llava.shapes.training.muon import Muon, orthogonalize
from llava.shapes.training.packed import packed_forward
from llava.shapes.training.recipe import CAPTIONS, PINPOINTS, RECIPES, V15, V16, Sizes
from llava.shapes.vocabulary import COLOR_NAMES, KINDS

TINY = Sizes(width=32, tower_layers=3, tower_mlp=48, llm_mlp=48, heads=2, llm_layers=4)


def tiny(recipe):
    stages = tuple(dataclasses.replace(stage, steps=2, batch=2, questions=3) for stage in recipe.stages)
    return dataclasses.replace(recipe, stages=stages, sizes=TINY, validation_images=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, v1.5 model, v1.6 model) after two steps of every stage of both recipes."""
    folder = tmp_path_factory.mktemp("demo")
    first = run.train(tiny(V15), folder / "train" / "v1.5", folder / "v1.5")
    second = run.train(tiny(V16), folder / "train" / "v1.6", folder / "v1.6", folder / "v1.5")
    return folder, first, second


def test_checkpoints_have_the_original_format(trained):
    folder, first, _ = trained
    for name, newline in (("v1.5", False), ("v1.6", True)):
        tensors = load_file(folder / name / "model.safetensors")
        assert ("model.image_newline" in tensors) == newline
        assert {t.dtype for t in tensors.values()} == {torch.float16}
        tower = "model.vision_tower.vision_tower.vision_model."
        assert tower + "encoder.layers.2.mlp.fc2.weight" in tensors and tower + "pre_layrnorm.weight" in tensors
        for key in ("embed_tokens.weight", "norm.weight", "layers.3.self_attn.q_proj.weight", "mm_projector.2.bias"):
            assert f"model.{key}" in tensors
        config = json.loads((folder / name / "config.json").read_text())
        assert config["architectures"] == ["LlavaLlamaForCausalLM"] and config["model_type"] == "llava_llama"
        assert config["image_aspect_ratio"] == ("anyres" if newline else "pad")
        assert config.get("image_grid_pinpoints") == ([list(p) for p in PINPOINTS] if newline else None)
        for file in ("vision_tower/config.json", "vision_tower/preprocessor_config.json", "tokenizer.json"):
            assert (folder / name / file).is_file()
    again = load_demo_model(folder / "v1.5", TINY)
    for key, value in first.state_dict().items():
        assert torch.allclose(value, again.state_dict()[key], atol=2e-3) or key == "image_newline"


@pytest.mark.parametrize("family", ["v1.5", "v1.6"])
def test_training_sees_what_evaluation_sees(trained, family):
    """One prompt per question through load_pretrained_model gives the hidden states of the packed batch."""
    from PIL import Image

    from llava.mm_utils import process_images
    from llava.model.builder import load_pretrained_model

    folder = trained[0]
    tokenizer, model, processor, _ = load_pretrained_model(folder / family, device_map="cpu")
    mine = load_demo_model(folder / family, TINY)
    pinpoints = PINPOINTS if family == "v1.6" else None
    scene, questions = scene_questions(family, "test", 3)
    image = Image.fromarray(scene.pixels)
    tiles, _ = data.scene_tiles(scene, pinpoints)
    order = image_order(scene.size, pinpoints, TINY.side)
    order = torch.where(order < 0, torch.tensor(len(tiles) * TINY.side**2), order)[None]
    prefix = data.prefix_ids()
    assert (
        prefix
        == tokenizer(
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            "detailed, and polite answers to the user's questions. USER: "
        ).input_ids
    )
    ids = [data.question_ids(question.text) for question in questions]
    block = max(map(len, ids))
    padded = torch.tensor([row + [0] * (block - len(row)) for row in ids])[None]
    with torch.no_grad():
        features = mine.projector(mine.see(torch.from_numpy(tiles))[:, 1:])
        embeddings = image_embeddings(features, mine.image_newline, order)
        packed = packed_forward(mine.llm, torch.tensor(prefix), embeddings, padded)[0] @ mine.embeddings.T
        for row, tokens in enumerate(ids):
            prompt = torch.tensor([[*prefix, -200, *tokens]])
            pixels = process_images([image], processor, model.config)
            logits = model(input_ids=prompt, images=pixels, image_sizes=[image.size]).logits
            assert torch.allclose(logits[0, -1], packed[row, len(tokens) - 1], atol=1e-4)


def test_a_stopped_run_goes_on_and_another_recipe_is_refused(trained):
    folder, first, _ = trained
    work = folder / "train" / "v1.5"
    (work / f"stage_{V15.stages[-1].name}.pt").unlink()
    again = run.train(tiny(V15), work, folder / "again")
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True))
    other = tiny(dataclasses.replace(V15, alignment=False))
    with pytest.raises(UserError, match="another recipe"):
        run.train(other, work, folder / "other")
    with pytest.raises(UserError, match="train that checkpoint first"):
        run.train(tiny(V16), folder / "train" / "none", folder / "none", folder / "nowhere")


def test_training_on_captions_goes_on_from_a_checkpoint(trained):
    folder, first, _ = trained
    model = run.train(tiny(CAPTIONS), folder / "train" / "captions", folder / "captions", folder / "v1.5")
    assert (folder / "captions" / "model.safetensors").is_file()
    moved = {
        name
        for name, value in model.state_dict().items()
        if not torch.allclose(value, first.state_dict()[name], atol=2e-3)
    }
    assert any(name.startswith("llm.") for name in moved) and not any(name.startswith("tower.") for name in moved)
    rows = [json.loads(line) for line in (folder / "train" / "captions" / "log.jsonl").read_text().splitlines()]
    assert all(0 <= row["validation"]["all"] <= 1 for row in rows if "finished" in row)


def test_a_batch_of_captions(tmp_path):
    """The whole caption and the end token come after the cue, and similar lengths share a batch without more padding."""
    pictures = data.picture_set("v1.5", "validation", 0, 8, data.Asked(captions=True), None, tmp_path, processes=1)
    tokenizer, pad, longest = build_tokenizer(), data.word_id("<pad>"), []
    captions = {caption(draw_scene("v1.5", "validation", index)).lower() for index in range(8)}
    for batch in batches(pictures, 4, None, 12):
        rows, cues = batch.questions[:, 0], batch.cue[:, 0]
        assert bool((rows != pad).sum(1).max() == rows.shape[1])
        longest.append(rows.shape[1])
        for row, cue in zip(rows, cues.tolist(), strict=True):
            assert row[: cue + 1].tolist() == data.question_ids(PROMPT)
            ids = row[cue + 1 :][row[cue + 1 :] != pad].tolist()
            assert ids[-1] == data.word_id("</s>")
            said = tokenizer.decode(ids[:-1])
            captions.remove(said.replace(" .", ".").replace(" ,", ",").replace(" :", ":"))
    assert not captions and longest == sorted(longest) and longest[0] < longest[1]


def test_caption_loss_counts_the_tokens_behind_the_cue():
    """Two captions of 2 and 3 tokens behind their cues, with logits of 10 for the right token and 0 for the others."""
    pad, words = 3, torch.eye(8)
    questions = torch.tensor([[[7, 6, 5, 2, 3, 3]], [[6, 7, 4, 5, 2, 3]]])
    cue = torch.tensor([[1], [1]])
    hidden = 10 * torch.cat([words[questions[:, :, 1:]], torch.zeros(2, 1, 1, 8)], dim=2)
    each = math.log(math.exp(10) + 7) - 10
    loss, right = caption_loss(hidden, questions, cue, words, pad)
    assert float(loss) == pytest.approx(each, rel=1e-3) and right.tolist() == [[True], [True]]
    # In front of the cue, and on padding, nothing is learnt.
    hidden[:, :, 0], hidden[0, :, 3:] = 0, 0
    assert caption_loss(hidden, questions, cue, words, pad)[0] == loss
    hidden[1, 0, 3] = 10 * words[1]  # "2" should follow
    loss, right = caption_loss(hidden, questions, cue, words, pad)
    assert float(loss) == pytest.approx((4 * each + each + 10) / 5, rel=1e-3) and right.tolist() == [[True], [False]]


def test_grown_layers_change_nothing_at_first():
    torch.manual_seed(0)
    model = DemoModel(TINY, 2)
    ids = torch.randint(0, 50, (1, 9))
    before = model.llm(ids).logits
    model.grow_llm(4)
    assert len(model.llm.model.layers) == 4
    assert torch.allclose(before, model.llm(ids).logits, atol=1e-5)


def test_batches_put_the_tiles_in_order(tmp_path):
    pictures = data.picture_set("v1.6", "validation", 0, 6, data.Asked(3), PINPOINTS, tmp_path, processes=1)
    batch = next(batches(pictures, 6, PINPOINTS, 12))
    patches = len(batch.tiles) * 144
    assert int(batch.order.max()) <= patches + 1
    for row, length in enumerate(batch.lengths.tolist()):
        real = batch.order[row, :length]
        assert int((real == patches).sum()) > 0 and int(real.max()) == patches
        assert bool((batch.order[row, length:] == patches + 1).all())
    answers = batch.questions.gather(2, batch.cue.unsqueeze(-1) + 1)
    assert bool((answers > 3).all()) and bool(
        (batch.questions.gather(2, batch.cue.unsqueeze(-1)) == data.word_id(":")).all()
    )
    longer = next(batches(pictures, 6, PINPOINTS, 12, suffix_every=1))
    assert bool((longer.questions.gather(2, longer.cue.unsqueeze(-1) + 1) == answers).all())
    assert bool((longer.questions == data.word_id("phrase")).any(-1).all())


def test_compressed_positions_only_move_closer():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([5, 9])
    positions = jittered_positions(lengths, 9, 1.0, generator)
    steps = positions.diff(dim=1)
    assert bool((steps >= 0).all()) and bool((steps[:, :-1] <= 1).all()) and bool((positions[:, -1] >= 1).all())
    plain = jittered_positions(lengths, 9, 0.0, generator)
    assert plain[1].tolist() == list(range(10)) and plain[0].tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5, 5]


def test_sparse_pictures_lose_background_only(tmp_path):
    pictures = data.picture_set("v1.6", "validation", 0, 6, data.Asked(3), PINPOINTS, tmp_path, processes=1)
    batch = next(batches(pictures, 6, PINPOINTS, 12))
    patches = batch.owners.numel()
    order, lengths = sparse_order(batch, 1.0, torch.Generator().manual_seed(1))
    shows = set(torch.nonzero(batch.owners.flatten() >= 0).flatten().tolist()) | {patches}
    for row in range(6):
        before, after = batch.order[row, : batch.lengths[row]].tolist(), order[row, : lengths[row]].tolist()
        kept = set(after)
        assert after == [i for i in before if i in kept]
        assert [i for i in after if i in shows] == [i for i in before if i in shows]
    assert int(lengths.sum()) < int(batch.lengths.sum())
    bare, fewest = sparse_order(batch, 1.0, torch.Generator().manual_seed(1), least=1.0)
    assert all(set(bare[row, :n].tolist()) <= shows for row, n in enumerate(fewest))
    same, _ = sparse_order(batch, 0.0, torch.Generator())
    assert torch.equal(same, batch.order)


def test_losses_fall_where_they_should():
    table = data.naming_table()
    torch.manual_seed(0)
    words = torch.randn(table.shape[1], 32)
    owners, kinds, colors = torch.tensor([[0, -1]]), torch.tensor([[3, -1, -1]]), torch.tensor([[2, -1, -1]])
    named = words[table[3 * 8 + 2] > 0].sum(0)
    right = alignment_loss(torch.stack([named, -words.sum(0)])[None], owners, kinds, colors, words)
    wrong = alignment_loss(torch.stack([-named, named])[None], owners, kinds, colors, words)
    assert right < wrong
    # One object on two patches: evenness costs nothing where both are as near to its words, else its weight times the
    # variance of each word's cosines, here (0.9 / 2) squared or less.
    owners, both = torch.zeros(1, 2, dtype=torch.long), torch.stack([named, named])[None]
    uneven = torch.stack([named, named - 3 * words[table[3 * 8 + 2] > 0][0]])[None]

    def cost(patches):
        arguments = (patches, owners, kinds, colors, words, 0.0)
        return float(alignment_loss(*arguments, 1.0) - alignment_loss(*arguments, 0.0))

    assert cost(both) == pytest.approx(0.0, abs=1e-6) and 0.01 < cost(uneven) < 0.25
    captioner = Captioner(16)
    assert torch.isfinite(
        captioner(torch.randn(2, 16), torch.tensor([[1, -1], [2, 3]]), torch.tensor([[1, -1], [2, 3]]))
    )


def test_lookup_loss_wants_the_colour_of_the_asked_kind(tmp_path):
    pictures = data.picture_set(
        "v1.5", "validation", 0, 8, data.Asked(6, (0.0, 1.0, 0.0, 0.0)), None, tmp_path, processes=1
    )
    batch = next(batches(pictures, 8, None, 12))
    words = torch.eye(len(vocabulary()))
    found = torch.zeros(*batch.questions.shape, len(words))
    for b in range(8):
        objects = [(KINDS[k], COLOR_NAMES[c]) for k, c in zip(batch.kinds[b], batch.colors[b], strict=True) if k >= 0]
        for q in range(6):
            cue = int(batch.cue[b, q])
            colors = [c for k, c in objects if data.word_id(k) == int(batch.questions[b, q, cue - 3])]
            if len(colors) == 1:
                found[b, q, cue - 2, data.word_id(colors[0])] = 50.0
    assert lookup_loss(found, batch, words) < 1e-3 < 1.0 < lookup_loss(torch.zeros_like(found), batch, words)
    nothing = torch.zeros_like(found)
    batch.category[:] = 0
    assert lookup_loss(nothing, batch, words) == 0.0


def test_muon_makes_orthogonal_steps():
    torch.manual_seed(0)
    for shape in ((3, 16, 16), (2, 48, 16), (2, 16, 48)):
        singular = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert bool((singular > 0.5).all()) and bool((singular < 1.4).all())
    parameter = torch.nn.Parameter(torch.zeros(16, 16))
    parameter.grad = torch.randn(16, 16)
    Muon([parameter], lr=0.1, weight_decay=0.0).step()
    assert 0.5 * 0.08 < float(torch.linalg.svdvals(parameter.detach()).median()) < 1.4 * 0.08


def test_the_command_refuses_bad_input(tmp_path, capsys):
    assert {"v1.5", "v1.6", "v1.5-no-alignment", "captions"} == set(RECIPES)
    for arguments in (
        ["--recipe", "v9"],
        ["--recipe", "v1.5", "--threads", "0"],
        ["--recipe", "v1.5", "--playground", "no"],
    ):
        with pytest.raises(SystemExit) as stopped:
            run.main(arguments)
        assert stopped.value.code == 2
    assert "no folder no" in capsys.readouterr().err
