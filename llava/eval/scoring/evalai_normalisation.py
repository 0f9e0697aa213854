"""Answer normalisation of the EvalAI server for VQAv2, VizWiz and TextVQA.

The tables and the order of the steps are protocol, with all their oddities. The source is EvalAIAnswerProcessor in
facebookresearch/mmf (pythia/tasks/processors.py); LLaVA's m4c_evaluator.py is a copy of it.
"""

from __future__ import annotations

import re

_CONTRACTIONS = """
aint:ain't arent:aren't cant:can't couldve:could've couldnt:couldn't couldn'tve:couldn't've couldnt've:couldn't've
didnt:didn't doesnt:doesn't dont:don't hadnt:hadn't hadnt've:hadn't've hadn'tve:hadn't've hasnt:hasn't
havent:haven't hed:he'd hed've:he'd've he'dve:he'd've hes:he's howd:how'd howll:how'll hows:how's Id've:I'd've
I'dve:I'd've Im:I'm Ive:I've isnt:isn't itd:it'd itd've:it'd've it'dve:it'd've itll:it'll let's:let's maam:ma'am
mightnt:mightn't mightnt've:mightn't've mightn'tve:mightn't've mightve:might've mustnt:mustn't mustve:must've
neednt:needn't notve:not've oclock:o'clock oughtnt:oughtn't ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at
shant:shan't shed've:she'd've she'dve:she'd've she's:she's shouldve:should've shouldnt:shouldn't
shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
somebody'dve:somebody'd've somebodyll:somebody'll somebodys:somebody's someoned:someone'd someoned've:someone'd've
someone'dve:someone'd've someonell:someone'll someones:someone's somethingd:something'd
somethingd've:something'd've something'dve:something'd've somethingll:something'll thats:that's thered:there'd
thered've:there'd've there'dve:there'd've therere:there're theres:there's theyd:they'd theyd've:they'd've
they'dve:they'd've theyll:they'll theyre:they're theyve:they've twas:'twas wasnt:wasn't wed've:we'd've
we'dve:we'd've weve:we've werent:weren't whatll:what'll whatre:what're whats:what's whatve:what've whens:when's
whered:where'd wheres:where's whereve:where've whod:who'd whod've:who'd've who'dve:who'd've wholl:who'll whos:who's
whove:who've whyll:why'll whyre:why're whys:why's wont:won't wouldve:would've wouldnt:wouldn't
wouldnt've:wouldn't've wouldn'tve:wouldn't've yall:y'all yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've
y'alld've:y'all'd've y'all'dve:y'all'd've youd:you'd youd've:you'd've you'dve:you'd've youll:you'll youre:you're
youve:you've
"""
CONTRACTIONS = dict(pair.split(":") for pair in _CONTRACTIONS.split())
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {word: str(value) for value, word in enumerate(_DIGITS)} | {"none": "0"}
ARTICLES = ("a", "an", "the")
PUNCTUATION = tuple(';/[]"{}()=+\\_-><@`,?!')

# Upstream wrote "(?!<=" for "(?<!". It excludes nothing, so a period after a digit is removed too, unless a digit
# follows.
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
# In `normalise` this never matches, because the commas are removed before.
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Upstream passes re.UNICODE to sub() as the argument `count`, so at most 32 periods are removed.
_MOST_PERIODS = int(re.UNICODE)


def normalise(answer: str) -> str:
    """Return EvalAI's normal form of an answer: case, punctuation, numbers, articles and contractions."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return normalise_words(strip_punctuation(text))


def strip_punctuation(text: str) -> str:
    """Remove punctuation marks beside a space, replace those inside a word by a space, and remove periods."""
    # Upstream looks for marks in the original text and replaces them in the result, mark by mark.
    result = text
    for mark in PUNCTUATION:
        beside_space = mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if beside_space or _COMMA_IN_NUMBER.search(text) else " ")
    return _PERIOD.sub("", result, count=_MOST_PERIODS)


def normalise_words(text: str) -> str:
    """Return the text in lower case, with digits for number words, without articles, and with apostrophes."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
