"""VQA accuracy: the official normaliser and soft accuracy of the VQA challenge, and plain exact match.

The rules are those of https://github.com/GT-Vision-Lab/VQA (Antol et al. 2015, "VQA: Visual Question Answering"),
oddities included, so that scores can be compared with published ones.
"""

import re
from collections.abc import Sequence

_NUMBERS = {
    word: str(number)
    for number, words in enumerate(
        ["none zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
    for word in words.split()
}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")

# Written right; each is also recognised with any one of its apostrophes missing. "I" is absent because the official
# table has it in upper case and looks it up in lower case; "let's" and "she's" because it maps them to themselves.
_CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_CONTRACTED = {
    word[:i] + word[i + 1 :]: word for word in _CONTRACTIONS.split() for i, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}


def _flatten(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalize(text: str) -> str:
    """An answer as the official VQA evaluation compares it.

    In this order: line breaks and tabs become spaces; each punctuation mark is deleted where any one of its kind
    stands beside a space or the text holds a number with a comma, and becomes a space otherwise; the first 32 periods
    not followed by a digit are deleted; words are lower-cased, numbers up to ten become digits ("none" becomes 0),
    articles are dropped and missing apostrophes put back.
    """
    raw = _flatten(text)
    delete_all = bool(_COMMA_IN_NUMBER.search(raw))
    clean = raw
    for mark in _PUNCTUATION:
        delete = delete_all or f"{mark} " in raw or f" {mark}" in raw
        clean = clean.replace(mark, "" if delete else " ")
    # The official code passes re.UNICODE, which is 32, where `sub` expects a count.
    clean = _PERIOD.sub("", clean, count=32)
    words = (_NUMBERS.get(word, word) for word in clean.lower().split())
    return " ".join(_CONTRACTED.get(word, word) for word in words if word not in _ARTICLES)


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction is one of the answers, else 0.0.

    Compared without case, without surrounding white space and without one period at the end; nothing else is forgiven.
    """
    return float(_plain(prediction) in {_plain(answer) for answer in answers})


def _plain(text: str) -> str:
    return text.strip().lower().removesuffix(".").rstrip()


def soft_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy in 0…1: each answer in turn is left out, the rest vote, and the scores are averaged.

    One vote is ``min(1, matches among the others / 3)``. As in the official code, prediction and answers are
    normalised only where the answers are not all the same. With a single reference, where the official rule always
    gives 0, it is equality after normalisation: data sets with one reference a question would have no score otherwise.

    Raises:
        ValueError: there is no answer to compare with.
    """
    if not answers:
        raise ValueError("soft accuracy needs at least one reference answer")
    if len(answers) == 1:
        return float(normalize(prediction) == normalize(answers[0]))
    prediction, answers = _flatten(prediction), [_flatten(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalize(prediction), [normalize(answer) for answer in answers]
    matches = [answer == prediction for answer in answers]
    votes = sum(matches)
    return sum(min(1.0, (votes - match) / 3) for match in matches) / len(matches)
