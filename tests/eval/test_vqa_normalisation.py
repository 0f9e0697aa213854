"""Answer normalisation and soft accuracy, against tables worked out by hand from the published rules.

EvalAI's form (facebookresearch/mmf, EvalAIAnswerProcessor), in its order:
  case      everything is lower-cased
  comma     commas and question marks go, nothing takes their place; 's gets a space before it
  line      line breaks and tabs become spaces
  mark      each of ;/[]"{}()=+\\_-><@`,?! becomes a space; where it stands beside a space anywhere in the answer, all of
            its occurrences go without one
  period    a period goes unless a digit follows
  number    none and zero to ten become digits
  article   a, an and the go
  short     contractions without apostrophe get one
The official rule of VQAv2 (GT-Vision-Lab/VQA, vqaEval.py) knows no step `comma`, and applies the others only where
the people disagree.
"""

import pytest

from llava.eval.scoring.evalai_normalisation import ARTICLES, CONTRACTIONS, NUMBERS, PUNCTUATION, normalise
from llava.eval.scoring.vqa_accuracy import leave_one_out, official_accuracy, textvqa_accuracy

TABLE = [
    ("YES", "yes", "case"),
    ("New York", "new york", "case"),
    ("1,000", "1000", "comma"),
    ("1,000.5", "1000.5", "comma"),
    ("red, white, and blue", "red white and blue", "comma"),
    ("yes,no", "yesno", "comma: nothing takes its place"),
    ("what?", "what", "comma: question marks too"),
    ("what ?", "what", "comma"),
    ("dog's", "dog 's", "comma: the space before 's"),
    ("it's", "it 's", "comma: 's before short"),
    ("what's", "what 's", "comma"),
    ("she's", "she 's", "comma: so the entry she's of the table is never met"),
    ("red\ncar", "red car", "line"),
    ("red\t car", "red car", "line"),
    ("line\none\ttab", "line 1 tab", "line, number"),
    ("black/white", "black white", "mark inside a word"),
    ("t-shirt", "t shirt", "mark"),
    ("semi;colon", "semi colon", "mark"),
    ("user@mail", "user mail", "mark"),
    ("x=y", "x y", "mark"),
    ("c++", "c", "mark at the end: the space is stripped"),
    ("[exit]", "exit", "mark"),
    ("(stop)", "stop", "mark"),
    ("{go}", "go", "mark"),
    ('"hello"', "hello", "mark"),
    ("back\\slash", "back slash", "mark"),
    ("<b>", "b", "mark"),
    ("wow!", "wow", "mark"),
    ("`tick`", "tick", "mark"),
    ("snake_case", "snake case", "mark"),
    ("7-up", "7 up", "mark"),
    ("-5", "5", "mark: the sign is lost"),
    ("black / white", "black white", "mark beside a space"),
    ("t- shirt", "t shirt", "mark beside a space"),
    ("rock-n -roll", "rockn roll", "mark beside a space once: all of them go without a space"),
    ("24-7 -ish", "247 ish", "mark beside a space once"),
    ("minus -5", "minus 5", "mark beside a space"),
    ("and/or maybe", "and or maybe", "a space elsewhere does not matter"),
    ("10:30", "10:30", "the colon is no mark"),
    ("50%", "50%", "% is no mark"),
    ("$5", "$5", "$ is no mark"),
    ("#1", "#1", "# is no mark"),
    ("rock & roll", "rock & roll", "& is no mark"),
    ("5*", "5*", "* is no mark"),
    ("p.m.", "pm", "period"),
    ("u.s.a.", "usa", "period"),
    ("dr. who", "dr who", "period"),
    ("5.", "5", "period: no digit follows"),
    ("5.5", "5.5", "period before a digit"),
    (".5", ".5", "period before a digit"),
    ("v1.6", "v1.6", "period before a digit"),
    ("3.a", "3a", "period: what stands before does not matter (the look-behind is misspelt)"),
    ("...", "", "period"),
    ("a." * 40, "a" * 33 + ".a" * 7 + ".", "period: 32 at most, as re.UNICODE stands where the count goes"),
    ("two dogs", "2 dogs", "number"),
    ("None", "0", "number"),
    ("zero", "0", "number"),
    ("ten", "10", "number"),
    ("eleven", "eleven", "number: up to ten"),
    ("twenty one", "twenty 1", "number: word by word"),
    ("two.", "2", "number after period"),
    ("two-three", "2 3", "number after mark"),
    ("the", "", "article"),
    ("an apple", "apple", "article"),
    ("The End", "end", "article after case"),
    ("theatre", "theatre", "article: whole words"),
    ("plan a", "plan", "article, also a letter that looks like one"),
    ("a/c on", "c on", "article after mark"),
    ("dont", "don't", "short"),
    ("cant", "can't", "short"),
    ("hes", "he's", "short"),
    ("whats", "what's", "short: not touched by comma"),
    ("theyre", "they're", "short"),
    ("yall", "y'all", "short"),
    ("wont", "won't", "short"),
    ("oclock", "o'clock", "short"),
    ("o'clock", "o'clock", "short: right already"),
    ("shed've", "she'd've", "short"),
    ("couldnt've", "couldn't've", "short"),
    ("somebody'd", "somebodyd", "short: the table loses this one's apostrophe"),
    ("Im", "im", "short: the table's Im is never met, case comes first"),
    ("its", "its", "short: not in the table"),
    ("The dog's two bones.", "dog 's 2 bones", "comma, period, number, article"),
    ("A.M./P.M.", "am pm", "mark, period"),
    ("No, it isn't!", "no it isn't", "comma, mark"),
    ("Coca-Cola, diet", "coca cola diet", "comma, mark"),
    ("  two   words ", "2 words", "spaces"),
    ("", "", "nothing"),
]


def test_tables_have_the_published_size():
    assert len(CONTRACTIONS) == 120 and len(NUMBERS) == 12 and len(ARTICLES) == 3 and len(PUNCTUATION) == 21
    assert len(TABLE) >= 60 and len({raw for raw, *_ in TABLE}) == len(TABLE)


@pytest.mark.parametrize("raw, expected, rule", TABLE)
def test_evalai_form(raw, expected, rule):
    assert normalise(raw) == expected, rule


@pytest.mark.parametrize("said, accuracy", [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_leave_one_out(said, accuracy):
    """k of 10: (k min(k - 1, 3) / 3 + (10 - k) min(k, 3) / 3) / 10."""
    people = ["dog"] * said + ["cat"] * (10 - said)
    assert leave_one_out("dog", people) == pytest.approx(accuracy, abs=1e-12)


@pytest.mark.parametrize(
    "answer, people, accuracy, rule",
    [
        ("yes", ["yes"] * 10, 1.0, "all agree: the very string"),
        ("yes\n", ["yes"] * 10, 1.0, "line breaks and outer spaces always go"),
        ("the dog", ["dog"] * 10, 0.0, "all agree: no normalisation"),
        ("Yes", ["yes"] * 10, 0.0, "all agree: not even case"),
        ("the dog", ["dog"] * 9 + ["cat"], 1.0, "they disagree: article"),
        ("two", ["2"] * 5 + ["3"] * 5, 1.0, "they disagree: number, of the answer"),
        ("2", ["two"] * 4 + ["3"] * 6, 1.0, "they disagree: number, of the people"),
        ("1,000", ["1000"] * 4 + ["5"] * 6, 1.0, "a comma between digits goes"),
        ("1,000-2", ["10002"] * 4 + ["5"] * 6, 1.0, "a comma between digits: every mark goes without a space"),
        ("yes,no", ["yes no"] * 4 + ["x"] * 6, 1.0, "a comma elsewhere is a mark like the others"),
        ("dog's", ["dog's"] * 4 + ["x"] * 6, 1.0, "'s stays"),
        ("dont", ["don't"] * 4 + ["x"] * 6, 1.0, "short"),
        ("dog", ["Dog"] * 3 + ["cat"] * 7, 0.9, "they disagree: case"),
    ],
)
def test_official_accuracy(answer, people, accuracy, rule):
    assert official_accuracy(answer, people) == pytest.approx(accuracy, abs=1e-12), rule


def test_textvqa_normalises_whether_or_not_the_people_agree():
    assert textvqa_accuracy("The Dog's", ["dog 's"] * 10) == 1.0
    assert textvqa_accuracy("Two.", ["2"] * 10) == 1.0
    assert textvqa_accuracy("cat", ["2"] * 10) == 0.0
