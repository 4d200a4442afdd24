# SPDX-License-Identifier: Apache-2.0
"""Metrics of answers, of rankings, and of a compressed model beside the uncompressed one.

`METRICS` holds the metrics of answers by name. Each takes a prediction and all reference answers
and returns 0 to 1; the mean over the questions is the figure that papers print. Where papers and
harnesses differ, each form has a name of its own and its docstring says which is which. lmms-eval
means release 0.7.3.

`recall_at_k` and `top_k_accuracy` are those of retrieval and classification; `agreement` and
`kl_divergence` need no labels.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...tuning.divergence import kl_divergence
from . import vqa_normalizer

__all__ = ["METRICS", "RECALL", "Metric", "kl_divergence", "metric"]

Score = Callable[[str, Sequence[str]], float]
Summary = Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, float]]
Check = Callable[[Sequence[str]], None]


@dataclass(frozen=True)
class Metric:
    """A metric of answers.

    Attributes:
        name: what `metric` finds it by.
        score: (prediction, references) -> 0 to 1; ValueError where `check` raises it.
        summary: (predictions, references of each) -> further figures of the whole set, or None.
        note: one sentence for people.
        check: raises a ValueError for references that no answer could match.
    """

    name: str
    score: Score
    summary: Summary | None = None
    note: str = ""
    check: Check = lambda references: None


METRICS: dict[str, Metric] = {}
RECALL = "recall"
"""In place of a metric: the task holds images and captions, to rank with `recall_at_k`."""


def metric(name: str) -> Metric:
    """Return the metric of this name.

    Raises:
        ValueError: there is none; the message lists all names.
    """
    if name == RECALL:
        raise ValueError("recall ranks captions and images (vtc retrieval); it scores no answers")
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}; one of {', '.join(METRICS)}")
    return METRICS[name]


def _some(references: Sequence[str]) -> None:
    if not references:
        raise ValueError("there is no reference answer")


def _annotators(references: Sequence[str]) -> None:
    if len(references) < 4:
        raise ValueError(
            f"VQA accuracy needs the answers of four or more people, not {len(references)}"
        )


def _register(
    name: str, note: str, summary: Summary | None = None, check: Check = _some
) -> Callable[[Score], Score]:
    """Enter a score under `name`."""

    def add(score: Score) -> Score:
        def checked(prediction: str, references: Sequence[str]) -> float:
            check(references)
            return float(score(prediction, references))

        METRICS[name] = Metric(name, checked, summary, note, check)
        return score

    return add


# ------------------------------------------------------------------------------ equal or not


def normalize(text: str) -> str:
    """Return `text` in lower case without punctuation or articles, number words as digits.

    Articles stay if there is nothing else: the answer "A" of a multiple choice is one.
    """
    words = re.findall(r"[^\W_]+", text.lower())
    kept = [w for w in words if w not in vqa_normalizer.ARTICLES] or words
    return " ".join(vqa_normalizer.NUMBERS.get(w, w) for w in kept)


@_register("one-word", "equal but for case, punctuation, articles and number words")
def one_word(prediction: str, references: Sequence[str]) -> float:
    """1 if the normalised prediction equals a normalised reference; ours, for short answers."""
    return normalize(prediction) in map(normalize, references)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _bare(text: str) -> str:
    text = text.strip().lower()
    return text.translate(_NO_PUNCTUATION).strip() or text


@_register("exact-match", "equal but for case and ASCII punctuation (GQA)")
def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1 if the prediction equals a reference but for case and the marks of `string.punctuation`.

    lmms-eval's `exact_match` with `ignore_case` and `ignore_punctuation`, as its GQA has it. It
    does not strip blanks at the ends, and takes all answers that are punctuation alone for equal;
    here such answers are compared as they are. GQA's own script compares the bare strings.
    """
    return _bare(prediction) in map(_bare, references)


# ------------------------------------------------------------------------------ soft accuracy


def _soft(prediction: str, references: Sequence[str]) -> float:
    """Mean over the annotators of min(1, matches among the other annotators / 3)."""
    n, hits = len(references), list(references).count(prediction)
    return (hits * min(1, (hits - 1) / 3) + (n - hits) * min(1, hits / 3)) / n


@_register("vqa", "VQA soft accuracy as in the official evaluation (VQAv2)", check=_annotators)
def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """VQA soft accuracy as VQAEval computes it: Antol et al. 2015 (arXiv:1505.00468), section 5.

    The mean over the annotators i of min(1, n_i / 3), n_i the matches among all others: of ten,
    one match is worth 0.3, two 0.6, three 0.9, four and more 1. The prediction is normalised
    (`vqa_normalizer.normalize`). The references lose their punctuation, and only *if they are not
    all equal*; their case, articles and number words stay, which VQAv2's are rid of already. For
    references as people wrote them take "vqa-evalai".

    Raises:
        ValueError: fewer than four references; no answer could reach 1.
    """
    if len(set(references)) > 1:
        references = [vqa_normalizer.strip_punctuation(r) for r in references]
    return _soft(vqa_normalizer.normalize(prediction), references)


@_register(
    "vqa-always",
    "VQA soft accuracy, all answers normalised (lmms-eval's VQAv2)",
    check=_annotators,
)
def vqa_always(prediction: str, references: Sequence[str]) -> float:
    """VQA soft accuracy with prediction and references normalised alike, whether equal or not.

    lmms-eval's VQAv2. It leaves the 33rd period of an answer in (see `vqa`).
    """
    return _soft(
        vqa_normalizer.normalize(prediction), [vqa_normalizer.normalize(r) for r in references]
    )


@_register(
    "vqa-evalai",
    "VQA soft accuracy with EvalAI's normaliser (TextVQA, VizWiz, OK-VQA)",
    check=_annotators,
)
def vqa_evalai(prediction: str, references: Sequence[str]) -> float:
    """VQA soft accuracy with EvalAI's normaliser on both sides, that of Pythia and M4C.

    lmms-eval's TextVQA, VizWiz and OK-VQA, whose answers are as people wrote them.
    """
    normal = vqa_normalizer.normalize_evalai
    return _soft(normal(prediction), [normal(r) for r in references])


# ------------------------------------------------------------------------------ text and numbers


def _distances(prediction: str, references: Sequence[str]) -> list[tuple[int, str, str]]:
    """(Levenshtein distance, prediction, reference) in lower case with single blanks."""
    from rapidfuzz.distance import Levenshtein

    text = " ".join(prediction.lower().split())
    others = [" ".join(r.lower().split()) for r in references]
    return [(Levenshtein.distance(text, other), text, other) for other in others]


@_register("anls", "average normalised Levenshtein similarity (DocVQA, InfoVQA)")
def anls(prediction: str, references: Sequence[str]) -> float:
    """ANLS: Biten et al. 2019 (arXiv:1907.00490), equation 1, threshold 0.5.

    The best over the references of 1 - NL where NL = distance / longer length, and 0 where
    NL >= 0.5. Case does not count (Mathew et al. 2021, DocVQA), nor do runs of blanks.
    """
    best = 0.0
    for distance, a, b in _distances(prediction, references):
        share = distance / max(len(a), len(b), 1)
        best = max(best, 1 - share if share < 0.5 else 0.0)
    return best


@_register("anls-lmms", "ANLS as lmms-eval and Qwen-VL compute it")
def anls_lmms(prediction: str, references: Sequence[str]) -> float:
    """ANLS of lmms-eval: as "anls", but a similarity of exactly 0.5 counts, and the lengths are
    taken before runs of blanks are joined and ends stripped, so that blanks raise the score."""
    shares = []
    for (distance, _, _), reference in zip(_distances(prediction, references), references):
        length = max(len(prediction.upper()), len(reference.upper()))
        shares.append(distance / length if length else 0.0)
    best = 1 - min(shares)
    return best if best >= 0.5 else 0.0


def _number(text: str) -> float | None:
    """Return a number, "12%" as 0.12, or None. "nan" and "inf" are words."""
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@_register("relaxed", "number within 5 %, else equal but for case (ChartQA)")
def relaxed(prediction: str, references: Sequence[str]) -> float:
    """Relaxed accuracy: Masry et al. 2022 (arXiv:2203.10244), section 5.1.

    1 if both are numbers and |prediction - reference| <= 0.05 |reference|, or if the strings are
    equal but for case. A percentage is divided by 100; "1,000" is not a number. In lmms-eval
    blanks at the ends count, "0" is compared as a string ("0.0" is wrong), and "nan" or "inf"
    never equals itself.
    """
    text = prediction.strip()
    value = _number(text)
    for reference in map(str.strip, references):
        target = _number(reference)
        if value is None or target is None:
            if text.lower() == reference.lower():
                return 1.0
        elif value == target or (target and abs(value - target) / abs(target) <= 0.05):
            return 1.0
    return 0.0


# Full-width forms of ASCII, and the ideographic blank.
_NARROW = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x3000: 0x20}


def _plain(text: str) -> str:
    return text.translate(_NARROW).lower().strip().replace("\n", " ")


@_register("ocr", "a reference occurs in the answer (OCRBench)")
def ocr_contains(prediction: str, references: Sequence[str]) -> float:
    """1 if a reference occurs in the prediction: Liu et al. 2023 (arXiv:2305.07895), OCRBench.

    Case, line breaks and full-width letters do not count. Not here: OCRBench's 100 formulas of
    HME100k, which it compares with case and without blanks. An empty reference, which occurs
    everywhere, is passed over.
    """
    text = _plain(prediction)
    return any(r in text for r in map(_plain, references) if r)


# ------------------------------------------------------------------------------ yes or no, letters


def _yes_no(text: str) -> str:
    """Return "yes" or "no" by the first word, else ""."""
    first = re.search(r"[^\W_]+", text.lower())
    return first[0] if first and first[0] in ("yes", "no") else ""


def _whole(text: str) -> str:
    """Return "yes" or "no" if that is the whole text, else ""."""
    text = text.lower().strip()
    return text if text in ("yes", "no") else ""


def _check_yes_no(references: Sequence[str]) -> None:
    if len(references) != 1 or not _whole(references[0]):
        raise ValueError(f'the answer must be "yes" or "no", not {", ".join(references)!r}')


def _pope_summary(read: Callable[[str], str]) -> Summary:
    def summary(
        predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        said = [read(p) for p in predictions]
        truth = [_whole(r[0]) for r in references]
        pairs = list(zip(said, truth, strict=True))

        def share(part: int, whole: int) -> float:
            return part / whole if whole else 0.0

        hits = pairs.count(("yes", "yes"))
        precision, recall = share(hits, said.count("yes")), share(hits, truth.count("yes"))
        both = precision + recall
        return {
            "accuracy": share(sum(a == b for a, b in pairs), len(pairs)),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / both if both else 0.0,
            "yes_rate": share(said.count("yes"), len(pairs)),
            "unread": share(said.count(""), len(pairs)),
        }

    return summary


@_register("pope", "yes or no by the first word", _pope_summary(_yes_no), _check_yes_no)
def pope(prediction: str, references: Sequence[str]) -> float:
    """POPE, 1 if the first word is the right one of yes and no: Li et al. 2023 (arXiv:2305.10355).

    The summary has accuracy, precision, recall and F1 of "yes", `yes_rate`, the share of answers
    that were "yes", and `unread`, the share that were neither (wrong, and a miss if the truth is
    "yes"). POPE's own script takes any "no" or "not" in the first sentence for "no" and all else
    for "yes", so that it has no unread answers.
    """
    return _yes_no(prediction) == _whole(references[0])


@_register("pope-whole", "yes or no as the whole answer", _pope_summary(_whole), _check_yes_no)
def pope_whole(prediction: str, references: Sequence[str]) -> float:
    """POPE of lmms-eval, where "Yes, there is." is wrong.

    Its recall leaves answers that are neither out of the misses, and its yes ratio is that of the
    true answers; here they are those of "pope".
    """
    return _whole(prediction) == _whole(references[0])


_SAID = r"(?i:(?:the |correct )*(?:answer|option|choice)(?: is)?:? *)"
_LETTER = re.compile(rf"{_SAID}\(?([A-Z])\b|(?:{_SAID})?\(?([A-Za-z])(?:[.):,]|$)")


def _letter(text: str) -> str:
    found = _LETTER.match(text.strip())
    return (found[1] or found[2]).lower() if found else ""


def _check_letter(references: Sequence[str]) -> None:
    _some(references)
    for text in references:
        if not re.fullmatch("[A-Za-z]", text.strip()):
            raise ValueError(f"the answer must be the letter of the right option, not {text!r}")


@_register("choice", "the letter of a multiple choice (ScienceQA)", check=_check_letter)
def choice(prediction: str, references: Sequence[str]) -> float:
    """1 if the answer starts with the right letter: "B", "b", "(B)", "B. a dog", "Answer: B".

    "A dog" names no letter. lmms-eval's ScienceQA takes "B", "b" and "B. ..." alone.
    """
    return _letter(prediction) in (r.strip().lower() for r in references)


# ------------------------------------------------------------------------------ rankings


def hits_at_k(
    similarity: Tensor,
    positives: Sequence[Collection[int]],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, Tensor]:
    """For each k, whether any positive of a query is among its k most similar, (Q,) bool.

    Args:
        similarity: (Q, G) of each query to the gallery; equal ones go to the lower index.
        positives: for each query, the columns that are right; one or more.

    Raises:
        ValueError: shapes that do not fit, k < 1, a query without positives, a NaN.
    """
    if similarity.ndim != 2 or len(positives) != len(similarity) or not len(positives):
        raise ValueError(
            f"similarity must be (queries, gallery) with a row for each of {len(positives)} "
            f"sets of positives, not {tuple(similarity.shape)}"
        )
    if min(ks) < 1:
        raise ValueError(f"k starts at 1, not {min(ks)}")
    if similarity.isnan().any():
        raise ValueError("similarity has NaN: the embeddings are broken")
    best = []  # the column of each query's most similar positive
    for query, columns in enumerate(positives):
        if not len(columns):
            raise ValueError(f"query {query} has no positives")
        ordered = sorted(columns)
        best.append(ordered[int(similarity[query, ordered].argmax())])
    column = torch.tensor(best, device=similarity.device)[:, None]
    reached = similarity.gather(1, column)
    earlier = torch.arange(similarity.shape[1], device=similarity.device) < column
    ahead = (similarity > reached) | ((similarity == reached) & earlier)
    rank = ahead.sum(1).cpu()
    return {k: rank < k for k in ks}


def recall_at_k(
    similarity: Tensor,
    positives: Sequence[Collection[int]],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[int, float]:
    """Recall@k as CLIP reports it: the share of queries with *any* positive in the top k.

    For the other direction pass `similarity.T` and the positives of each gallery entry. Not the
    recall of information retrieval, the share of positives found, which five captions of one
    image cap at 1/5 for k = 1 (LAION's CLIP_benchmark explains the difference). Arguments and
    errors as in `hits_at_k`.
    """
    return {
        k: hit.double().mean().item() for k, hit in hits_at_k(similarity, positives, ks).items()
    }


def top_k_accuracy(
    logits: Tensor, labels: Sequence[int] | Tensor, ks: Sequence[int] = (1, 5)
) -> dict[int, float]:
    """Share of rows of (N, classes) whose label is among the k largest; ties as in `hits_at_k`."""
    return recall_at_k(logits, [(int(label),) for label in labels], ks)


# ------------------------------------------------------------------------------ without labels


def agreement(answers: Sequence[str], reference: Sequence[str]) -> float:
    """Share of answers that are, but for blanks at the ends, those of the uncompressed model."""
    pairs = list(zip(answers, reference, strict=True))
    if not pairs:
        raise ValueError("agreement of no answers")
    return sum(a.strip() == b.strip() for a, b in pairs) / len(pairs)
