"""Training data: which tokens are learnt, one by one; the order of batches; and one clear sentence for what is wrong."""

import json
from collections import Counter

import pytest
import tiny_checkpoints as tiny
import torch
import train_data
from transformers import AutoTokenizer, LlamaConfig

from llava.common.errors import UserError
from llava.config import AdaVConfig
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import get_conversation
from llava.mm_utils import tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.train.dataset import Collator, ConversationDataset, check_captions, read_samples
from llava.train.labels import labelled_tokens, prompt_and_spans, turns_of
from llava.train.sampler import grouped_order

TURNS = ["<image>\nWhat colour is the shape?", "red", "How many digits?", "two and three"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """words: one token per word; chatml: with its special tokens; image: with <image>; pieces: sentencepiece."""
    made = {}
    for name, options in {"words": {}, "chatml": {"chatml": True}, "image": {"image_token": True}}.items():
        folder = tmp_path_factory.mktemp(name)
        tiny.write_word_tokenizer(folder, **options)
        made[name] = AutoTokenizer.from_pretrained(folder)
    folder = tmp_path_factory.mktemp("pieces")
    tiny.train_sentencepiece(folder)
    made["pieces"] = AutoTokenizer.from_pretrained(folder, config=LlamaConfig())
    return made


# ----------------------------------------------------------------------------------------------- what is learnt
def marked(turns, template, tokenizer):
    """The tokens as text, those that are learnt in brackets."""
    ids, labels = labelled_tokens(turns, template, tokenizer)
    words = []
    for token, label in zip(ids, labels, strict=True):
        text = "<image>" if token == IMAGE_TOKEN_INDEX else tokenizer.convert_ids_to_tokens(token)
        assert label in (token, IGNORE_INDEX)
        words.append(f"[{text}]" if label != IGNORE_INDEX else text)
    return " ".join(words).replace("\n", "/")


def test_vicuna_token_by_token(tokenizers):
    system = " ".join(tokenizers["words"].tokenize(get_conversation("vicuna_v1").system))
    assert marked(TURNS, "vicuna_v1", tokenizers["words"]) == (
        f"<s> {system} USER : <image> / What colour is <unk> shape ? ASSISTANT : [red] [</s>] USER : How many digits ? "
        "ASSISTANT : [two] [and] [three] [</s>]"
    ).replace("<unk>", "the" if "the" in tokenizers["words"].get_vocab() else "<unk>")


def test_chatml_token_by_token(tokenizers):
    found = marked(TURNS, "chatml_direct", tokenizers["chatml"])
    assert found.startswith(
        "<s> <|im_start|> system / Answer the questions . <|im_end|> <|im_start|> user / <image> / What"
    )
    learnt = [word for word in found.split(" ") if word.startswith("[")]
    assert learnt == ["[red]", "[<|im_end|>]", "[two]", "[and]", "[three]", "[<|im_end|>]"]


def test_mistral_token_by_token(tokenizers):
    found = marked(TURNS, "mistral_instruct", tokenizers["words"])
    learnt = [word for word in found.split(" ") if word.startswith("[") and word != "["]
    assert learnt == ["[red]", "[</s>]", "[two]", "[and]", "[three]", "[</s>]"]


def test_plain_token_by_token(tokenizers):
    """LLaVA's pretraining: the image, then the caption; the user's text is not used."""
    turns = ["Give a caption.\n<image>", "red circle and star"]
    assert marked(turns, "plain", tokenizers["words"]) == "<s> <image> [red] [circle] [and] [star] [/]"


@pytest.mark.parametrize("template", ["vicuna_v1", "chatml_direct", "mistral_instruct"])
@pytest.mark.parametrize("name", ["words", "chatml", "image", "pieces"])
@pytest.mark.parametrize("empty", [1, 3])
def test_an_empty_answer_is_not_learnt(tokenizers, template, name, empty):
    """As in LLaVA: its cue is read, no separator follows, and the other answer is learnt."""
    turns = ["<image>\nWhat colour is the shape?", "red", "How many digits?", "red"]
    turns[empty] = ""
    ids, labels = labelled_tokens(turns, template, tokenizers[name])
    learnt = [label for label in labels if label != IGNORE_INDEX]
    end = "<|im_end|>" if template == "chatml_direct" else "</s>"
    said = tokenizers[name].decode(learnt, skip_special_tokens=False)
    assert "".join(said.split()) == f"red{end}"
    if template == "vicuna_v1":
        prompt = f"{get_conversation(template).system} USER: {turns[0]} ASSISTANT:"
        prompt += (
            " red</s>USER: How many digits? ASSISTANT:" if empty == 3 else "USER: How many digits? ASSISTANT: red</s>"
        )
        assert ids == tokenizer_image_token(prompt, tokenizers[name])


@pytest.mark.parametrize("name", ["words", "image", "pieces"])
def test_without_images_the_placeholder_is_text(tokenizers, name):
    """Also for a tokenizer that has <image> as a token; the answer is learnt whole."""
    tokenizer = tokenizers[name]
    turns = ["What does <image> say?", "It says <image> red."]
    ids, labels = labelled_tokens(turns, "vicuna_v1", tokenizer, with_images=False)
    assert IMAGE_TOKEN_INDEX not in ids
    assert tokenizer.convert_tokens_to_ids("<image>") == tokenizer.unk_token_id or (
        tokenizer.convert_tokens_to_ids("<image>") not in ids
    )
    first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    assert labels[first:] == ids[first:]
    if name == "pieces":  # which spells everything
        assert tokenizer.decode(ids[first:]).strip() == "It says <image> red.</s>"


@pytest.mark.parametrize("template", ["vicuna_v1", "chatml_direct", "mistral_instruct"])
@pytest.mark.parametrize("name", ["words", "chatml", "image", "pieces"])
def test_ids_are_those_of_evaluation_and_answers_are_whole(tokenizers, template, name):
    """Whatever the tokenizer makes of it: the same ids, and what is learnt reads as the answers with their separators."""
    tokenizer = tokenizers[name]
    conversation = get_conversation(template)
    for number, text in enumerate(TURNS):
        conversation.append_message(conversation.roles[number % 2], text)
    ids, labels = labelled_tokens(TURNS, template, tokenizer)
    assert prompt_and_spans(TURNS, template)[0] == conversation.get_prompt()
    assert ids == tokenizer_image_token(conversation.get_prompt(), tokenizer)
    runs, last = [], False
    for label in labels:
        if label != IGNORE_INDEX:
            runs = runs if last else [*runs, []]
            runs[-1].append(label)
        last = label != IGNORE_INDEX
    end = {"chatml_direct": "<|im_end|>"}.get(template, "</s>")
    said = ["".join(tokenizer.decode(run, skip_special_tokens=False).split()) for run in runs]
    assert said == [f"red{end}", f"twoandthree{end}"]


def test_generation_begins_where_learning_does(tokenizers):
    """The ids before the first learnt token are the prompt that evaluation lets the model go on from."""
    for name, template in (("words", "vicuna_v1"), ("pieces", "vicuna_v1"), ("chatml", "chatml_direct")):
        ids, labels = labelled_tokens(TURNS, template, tokenizers[name])
        conversation = get_conversation(template)
        conversation.append_message(conversation.roles[0], TURNS[0])
        conversation.append_message(conversation.roles[1], None)
        prompt = tokenizer_image_token(conversation.get_prompt(), tokenizers[name])
        first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
        assert ids[:first] == prompt


def test_one_image_goes_to_the_front_of_its_turn():
    sample = {"conversations": train_data._turns([("gpt", "hello"), ("human", " Look: <image> why? "), ("gpt", "so")])}
    assert turns_of(sample, "x") == ["<image>\nLook:  why?", "so"]
    several = {"conversations": train_data._turns([("human", "<image> or <image>?"), ("gpt", "both")])}
    assert turns_of(several, "x")[0] == "<image> or <image>?"
    assert turns_of(several, "x", images=1)[0] == "<image>\nor ?", "one image: one placeholder, in front"
    assert turns_of(several, "x", images=0)[0] == "<image> or <image>?", "no image: text"


# --------------------------------------------------------------------------------------------------- the samples
@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_pretrained_model(train_data.start(tmp_path_factory.mktemp("start"))["llava"], device_map="cpu")


def dataset_of(loaded, folder, max_length=2048, **selection):
    tokenizer, model, image_processor, _ = loaded
    samples = read_samples(folder / "data.json", folder / "images")
    config = AdaVConfig(**({"method": "none"} | selection))
    return ConversationDataset(samples, "vicuna_v1", tokenizer, image_processor, model.config, config, max_length)


def test_a_batch_of_texts_still_runs_the_tower(loaded, tmp_path):
    """A blank picture with nothing to learn joins it: the projector gets gradients, all of them zero."""
    dataset = dataset_of(loaded, train_data.write_samples(tmp_path, count=1, texts=3))
    batch = Collator(dataset.blank)([dataset[i] for i in (1, 2, 3)])
    assert len(batch["images"]) == 1 and len(batch["input_ids"]) == 4
    assert bool((batch["labels"][3] == IGNORE_INDEX).all())
    model = loaded[1]
    model.zero_grad()
    with_blank = model(**batch).loss
    with_blank.backward()
    gradients = [p.grad for p in model.model.mm_projector.parameters()]
    assert all(g is not None and not g.any() for g in gradients)
    texts = {name: batch[name][:3] for name in ("input_ids", "labels", "attention_mask")}
    torch.testing.assert_close(model(**texts).loss, with_blank, atol=1e-5, rtol=0)
    model.zero_grad()


def test_what_is_too_long_is_cut_at_the_end(loaded, tmp_path):
    folder = train_data.write_samples(tmp_path, count=2)
    whole = dataset_of(loaded, folder)[1]
    tokens = len(whole["input_ids"]) + 15  # 16 patches for one placeholder
    assert len(dataset_of(loaded, folder, tokens)[1]["input_ids"]) == len(whole["input_ids"])
    with pytest.warns(
        UserWarning, match=rf'sample 1 \(id "1"\): {tokens} tokens, of which the first {tokens - 1} are used'
    ):
        cut = dataset_of(loaded, folder, tokens - 1)[1]
    assert torch.equal(cut["input_ids"], whole["input_ids"][:-1])
    # Selection makes room: 5 of 16 vision tokens.
    assert len(dataset_of(loaded, folder, tokens - 11, method="cls", overall_tokens=5)[1]["labels"]) == len(
        whole["labels"]
    )
    for limit in (30, 50):
        with pytest.raises(UserError, match="too long: .* it has no whole image or no answer left"):
            dataset_of(loaded, folder, limit)[1]


def rows(**changes):
    sample = {
        "id": "a",
        "image": "0.png",
        "conversations": train_data._turns([("human", "<image>\nWhy?"), ("gpt", "so")]),
    }
    return [{k: v for k, v in (sample | changes).items() if v is not None}]


def turns(*pairs):
    return {"conversations": train_data._turns(pairs)}


BAD = {
    "no placeholder": (rows(**turns(("human", "Why?"), ("gpt", "so"))), "0 <image> in its turns, but 1 images"),
    "placeholders in two turns": (
        rows(**turns(("human", "<image>"), ("gpt", "so"), ("human", "<image>"), ("gpt", "so"))),
        "2 <image> in its turns, but 1 images",
    ),
    "fewer images": (rows(image=["0.png", "0.png"]), "1 <image> in its turns, but 2 images"),
    "image is missing": (rows(image="gone.png"), "gone.png is not there"),
    "image is a folder": (rows(image="folder"), "images/folder is a folder"),
    "image outside": (rows(image="../data.json"), "does not lie inside"),
    "image of no name": (rows(image=7), '"image" is 7, allowed is a path or a list of paths'),
    "no turns": (rows(conversations=None), "is no list of turns, each with the texts"),
    "a turn is text": (rows(conversations=["hello"]), "(turn 1 is none)"),
    "a turn without a role": (rows(conversations=[{"value": "Why?"}]), "(turn 1 is none)"),
    "a turn without a text": (
        rows(conversations=[{"from": "human", "value": "a"}, {"from": "gpt"}]),
        "(turn 2 is none)",
    ),
    "a turn of another type": (rows(conversations=[{"from": "human", "value": 3}]), "(turn 1 is none)"),
    "twice the user": (
        rows(**turns(("human", "<image>"), ("human", "b"))),
        'turn 2 is from "human", allowed there is "gpt"',
    ),
    "another role": (rows(**turns(("human", "<image>"), ("bot", "b"))), 'turn 2 is from "bot", allowed there is "gpt"'),
    "no answer": (rows(**turns(("human", "<image>"))), "nothing to learn"),
    "an empty answer": (rows(**turns(("human", "<image>"), ("gpt", " "))), "nothing to learn"),
    "empty answers": (rows(**turns(("human", "a"), ("gpt", ""))) * 3, "none of its 3 samples can be learnt from"),
    "a sample is a number": ([3], "found int, allowed is one JSON object per sample"),
    "no samples": ([], "has no samples"),
    "no list": ({"a": 1}, "found dict, allowed is one JSON list"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data(tmp_path, case):
    content, message = BAD[case]
    (tmp_path / "images" / "folder").mkdir(parents=True)
    tiny.make_image(60, 60).save(tmp_path / "images" / "0.png")
    (tmp_path / "data.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        read_samples(tmp_path / "data.json", tmp_path / "images")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert str(tmp_path / "data.json") in str(error.value)


def write(tmp_path, content):
    """A data file with one picture, 0.png."""
    (tmp_path / "images").mkdir()
    tiny.make_image(60, 60).save(tmp_path / "images" / "0.png")
    (tmp_path / "data.json").write_text(json.dumps(content))
    return tmp_path


def test_one_sample_does_not_refuse_the_others(loaded, tmp_path):
    """What nothing can be learnt from is left out and counted; the rest is trained on."""
    empty = {"from": "gpt", "value": None}
    content = [
        *rows(),
        *rows(id="empty", **turns(("human", "<image>"), ("gpt", ""))),
        *rows(id="unanswered", **turns(("human", "<image>"))),
        *rows(
            id="partly",
            conversations=[*turns(("human", "<image>"), ("gpt", "so"), ("human", "b"))["conversations"], empty],
        ),
        *rows(id="text", image=None, **turns(("human", "Say <image>."), ("gpt", "<image>"))),
        *rows(id="twice", **turns(("human", "<image><image>\nWhy?"), ("gpt", "so"))),
        *rows(id="none", **turns(("human", "Why?"), ("gpt", "so"))),
    ]
    folder = write(tmp_path, content)
    with pytest.warns(UserWarning, match="3 of 7 samples are left out") as warned:
        dataset = dataset_of(loaded, folder)
    assert len(warned) == 1 and str(warned[0].message) == dataset.samples.note
    for words in (
        '2 have no answer (first: sample 1 (id "empty"): ',
        '1 have not as many images as <image> (first: sample 6 (id "none"): 0 <image> in its turns, but 1 images',
        '1 of 7 samples have an empty answer beside others, which is not learnt (first: sample 3 (id "partly"))',
    ):
        assert words in dataset.samples.note
    assert [sample.turns[0] for sample in dataset.samples] == [
        "<image>\nWhy?",
        "<image>",
        "Say <image>.",
        "<image>\nWhy?",
    ]
    items = [dataset[i] for i in range(4)]
    assert [int((item["input_ids"] == IMAGE_TOKEN_INDEX).sum()) for item in items] == [1, 1, 0, 1]
    assert bool(loaded[1](**Collator(dataset.blank)(items)).loss.isfinite())


def test_nothing_is_said_where_everything_is_learnt(tmp_path, recwarn):
    assert read_samples(write(tmp_path, rows()) / "data.json", tmp_path / "images").note == ""
    assert not recwarn.list


def test_all_missing_images_are_in_one_message(tmp_path):
    content = [*rows(), *(row for i in range(1, 30) for row in rows(id=i, image=[f"{i}.png"])), *rows(image="../x.png")]
    folder = write(tmp_path, content)
    with pytest.raises(UserError, match="data.json: 30 images cannot be read: sample 1 ") as error:
        read_samples(folder / "data.json", folder / "images")
    assert all(f"{folder}/images/{i}.png is not there" in str(error.value) for i in range(1, 30))
    assert "../x.png does not lie inside" in str(error.value) and "\n" not in str(error.value)
    content += [row for i in range(100) for row in rows(image=f"more-{i}.png")]
    (folder / "data.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="130 images cannot be read: .*; and 30 more$"):
        read_samples(folder / "data.json", folder / "images")


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_samples(tmp_path / "data.json", None)
    (tmp_path / "data.json").write_text("[{")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_samples(tmp_path / "data.json", None)
    (tmp_path / "data.json").write_text(json.dumps(rows()))
    with pytest.raises(UserError, match="--image_folder does not say"):
        read_samples(tmp_path / "data.json", None)
    with pytest.raises(UserError, match="--image_folder .*/nowhere: no such folder"):
        read_samples(tmp_path / "data.json", tmp_path / "nowhere")
    (tmp_path / "data.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_samples(tmp_path / "data.json", None)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        read_samples(tmp_path, None)


def test_data_with_a_byte_order_mark(tmp_path):
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "red"}]
    (tmp_path / "data.json").write_text(json.dumps([{"id": 1, "conversations": turns}]), encoding="utf-8-sig")
    assert len(read_samples(tmp_path / "data.json", None)) == 1


def test_captions_have_one_image_and_two_turns(tmp_path):
    samples = read_samples(train_data.write_samples(tmp_path) / "data.json", tmp_path / "images")
    check_captions(samples[:1])
    with pytest.raises(UserError, match=r'sample 1 \(id "1"\): 4 turns and 1 images'):
        check_captions(samples)


# ----------------------------------------------------------------------------------------------------- the order
def test_batches_have_one_modality_and_even_lengths():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 400, (531,), generator=generator).tolist()
    lengths = [-n if i % 3 == 0 else n for i, n in enumerate(lengths)]
    order = grouped_order(lengths, 4, 6, torch.Generator().manual_seed(1))
    assert sorted(order) == list(range(531))
    groups = [order[i : i + 24] for i in range(0, 531, 24)]
    left = 354 % 24 + 177 % 24
    for group in groups[: (531 - left) // 24]:
        assert len({lengths[i] > 0 for i in group}) == 1
        words = [sum(abs(lengths[i]) for i in group[p : p + 4]) for p in range(0, 24, 4)]
        assert max(words) - min(words) <= max(abs(lengths[i]) for i in group)
    kinds = Counter(lengths[group[0]] > 0 for group in groups[: (531 - left) // 24])
    assert kinds == {True: 354 // 24, False: 177 // 24}
    assert order == grouped_order(lengths, 4, 6, torch.Generator().manual_seed(1))
    assert order != grouped_order(lengths, 4, 6, torch.Generator().manual_seed(2))


def test_conversations_of_the_demo(tmp_path):
    """The demo's training pictures in LLaVA's format: every question once, and the trainer takes them."""
    from llava.shapes.conversations import write_conversations

    path = write_conversations("v1.6", 3, tmp_path)
    samples = read_samples(path, tmp_path / "images")
    assert len(samples) == 12 and len({sample.images[0] for sample in samples}) == 3
    questions = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    answers = [json.loads(line)["answer"] for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert [s.turns for s in samples] == [[f"<image>\n{q['text']}", a] for q, a in zip(questions, answers, strict=True)]
    check_captions(samples)
