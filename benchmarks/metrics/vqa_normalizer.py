# SPDX-License-Identifier: Apache-2.0
"""The answer normaliser of the official VQA evaluation, and that of EvalAI on top of it.

Its tables are facts of that evaluation (VQAEval, github.com/GT-Vision-Lab/VQA); the code is ours.
Kept because published numbers hang on them: "-" is a space in "t-shirt" but nothing in
"t- shirt"; one comma between digits makes all punctuation vanish without a space; "none" is 0.
Left out: upstream passes `re.UNICODE` (32) as the `count` of a substitution, so a 33rd period
stays in its text; here every period goes that no digit follows.
"""

from __future__ import annotations

import re

NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
}
ARTICLES = frozenset(("a", "an", "the"))
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA = re.compile(r"\d,+\d")
_PERIOD = re.compile(r"\.(?!\d)")

# A word that lacks one of its apostrophes gets it back. Words that are others without it (its,
# well, were, shell, lets) are not in the table.
_APOSTROPHES = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's they'd
they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _APOSTROPHES.split()
    for i, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # upstream has this one the wrong way round


def strip_punctuation(text: str) -> str:
    """Return `text` without punctuation, line breaks and tabs; its case stays.

    A mark vanishes if the text has it beside a space, or has a comma between digits; otherwise it
    becomes a space.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    digits = _COMMA.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside or digits else " ")
    return _PERIOD.sub("", result)


def strip_words(text: str) -> str:
    """Return `text` in lower case, number words as digits, without articles, apostrophes back."""
    words = (NUMBERS.get(w, "0" if w == "none" else w) for w in text.lower().split())
    return " ".join(CONTRACTIONS.get(w, w) for w in words if w not in ARTICLES)


def normalize(text: str) -> str:
    """Return what VQAEval compares of a predicted answer."""
    return strip_words(strip_punctuation(text))


def normalize_evalai(text: str) -> str:
    """Return what EvalAI's processor (Pythia, M4C; TextVQA, VizWiz) compares of an answer.

    Before `normalize` it drops every "," and "?" and sets "'s" off as a word of its own.
    """
    return normalize(text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())
