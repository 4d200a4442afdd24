# SPDX-License-Identifier: Apache-2.0
"""Metrics against values worked out by hand; tests/benchmarks/test_metrics_lmms.py has them beside
lmms-eval."""

import math

import pytest
import torch

from vtc.benchmarks.metrics import scores as metrics
from vtc.benchmarks.metrics import vqa_normalizer
from vtc.benchmarks.metrics.scores import (
    METRICS,
    agreement,
    hits_at_k,
    kl_divergence,
    metric,
    recall_at_k,
    top_k_accuracy,
)


def ten(**counts):
    """Ten annotators' answers: ten(yes=7, no=3)."""
    answers = [word for word, count in counts.items() for _ in range(count)]
    assert len(answers) == 10
    return answers


NORMALIZED = [
    ("Yes.", "yes"),  # a period goes unless a digit follows
    ("U.S.A.", "usa"),
    ("3.5", "3.5"),
    ("3.", "3"),
    (".5", ".5"),
    ("no. 5", "no 5"),
    ("t-shirt", "t shirt"),  # a mark between letters becomes a blank
    ("t- shirt", "t shirt"),  # beside a blank it vanishes; either way one blank is left
    ("mother-in-law, 2", "mother in law 2"),
    ("a-b - c", "ab c"),  # "- " and " -" are in the text, so *every* "-" vanishes
    ("1,000", "1000"),  # a comma between digits
    ("1,000 m/s", "1000 ms"),  # ... and then every mark vanishes, the "/" too
    ("5 m/s", "5 m s"),
    ("red, blue", "red blue"),
    ("red,blue", "red blue"),
    ("(left)", "left"),
    ("what?!", "what"),
    ("12:30", "12:30"),  # ":" and "'" are no marks of the table
    ("The two dogs", "2 dogs"),
    ("none", "0"),
    ("ten", "10"),
    ("eleven", "eleven"),
    ("a", ""),  # an article alone leaves nothing
    ("an apple\tor\nthe pear", "apple or pear"),
    ("dont", "don't"),
    ("couldnt've", "couldn't've"),
    ("its", "its"),  # a word of its own
    ("Im", "im"),  # upstream's "Im" is never met: words are in lower case by then
    ("somebody'd", "somebodyd"),  # upstream's slip, kept
    ("." * 40, ""),
    ("", ""),
]

GOLDEN = {
    "one-word": [
        ("Red", ["red"], 1),
        ("a red.", ["red"], 1),
        ("two", ["2"], 1),
        ("the two dogs", ["2 dogs"], 1),
        ("red", ["blue", "red"], 1),
        ("reddish", ["red"], 0),
        ("", ["red"], 0),
        ("A", ["A"], 1),
        ("the", ["A"], 0),  # an answer that is nothing but an article stays
        ("", ["A"], 0),
        ("Köln", ["köln"], 1),
        ("上海", ["北京"], 0),  # letters of any script count
    ],
    "exact-match": [
        ("Yes", ["yes"], 1),
        ("yes.", ["yes"], 1),
        (" yes ", ["yes"], 1),
        ("t-shirt", ["tshirt"], 1),  # punctuation is deleted, not replaced
        ("t shirt", ["t-shirt"], 0),
        ("the dog", ["dog"], 0),
        ("two", ["2"], 0),
        ("+", ["-"], 0),  # nothing but punctuation: compared as it is
        ("-", ["-"], 1),
        ("no", ["yes", "No!"], 1),
    ],
    # Of ten, m matches: m annotators see m - 1 others, 10 - m see m. 1: 9/10 * 1/3 = 0.3.
    # 2: (2 * 1/3 + 8 * 2/3) / 10 = 0.6. 3: (3 * 2/3 + 7) / 10 = 0.9.
    "vqa": [
        ("yes", ten(yes=0, no=10), 0),
        ("yes", ten(yes=1, no=9), 0.3),
        ("yes", ten(yes=2, no=8), 0.6),
        ("yes", ten(yes=3, no=7), 0.9),
        ("yes", ten(yes=4, no=6), 1),
        ("yes", ten(yes=10), 1),
        ("Yes.", ten(yes=4, no=6), 1),
        ("two", ["2"] * 10, 1),  # the prediction is always normalised
        ("the dog", ["dog"] * 10, 1),
        ("1,000", ["1000"] * 10, 1),
        # All equal, so they keep their "-", which the prediction loses.
        ("t-shirt", ["t-shirt"] * 10, 0),
        # They differ, so all lose it.
        ("t-shirt", ["t-shirt"] * 9 + ["shirt"], 1),
        ("Yes", ["yes."] * 10, 0),
        ("Yes", ["yes."] * 9 + ["no"], 1),
        # Case, articles and number words of the references stay in the official evaluation.
        ("nokia", ["Nokia"] * 9 + ["nokia"], 0.3),
        ("two", ["two"] * 9 + ["2"], 0.3),
        ("dont", ["don't"] * 3 + ["do not"] * 7, 0.9),
        # Four annotators: m = 1: 3/4 * 1/3 = 1/4. m = 2: (2 * 1/3 + 2 * 2/3) / 4 = 1/2.
        # m = 3: (3 * 2/3 + 1) / 4 = 3/4.
        ("a cat", ["cat", "dog", "dog", "dog"], 0.25),
        ("cat", ["cat", "cat", "dog", "dog"], 0.5),
        ("cat", ["cat", "cat", "cat", "dog"], 0.75),
        ("cat", ["cat"] * 4, 1),
    ],
    "vqa-always": [
        ("yes", ten(yes=3, no=7), 0.9),
        ("t-shirt", ["t-shirt"] * 10, 1),
        ("nokia", ["Nokia"] * 9 + ["nokia"], 1),
        ("two", ["two"] * 9 + ["2"], 1),
        ("none", ["0"] * 4 + ["some"] * 6, 1),
        ("the dog", ["a dog"] * 2 + ["cat"] * 8, 0.6),
        ("red blue", ["red,blue"] * 10, 1),
        ("dog's", ["dogs"] * 10, 0),
    ],
    "vqa-evalai": [
        ("yes", ten(yes=3, no=7), 0.9),
        ("Nokia", ["nokia"] * 10, 1),
        ("redblue", ["red,blue"] * 10, 1),  # commas vanish first
        ("red blue", ["red,blue"] * 10, 0),
        ("dog 's", ["dog's"] * 10, 1),
        ("what", ["what?"] * 10, 1),
        ("two", ["2"] * 4 + ["3"] * 6, 1),
        ("", ["the"] * 10, 1),  # nothing is left of an article
    ],
    "anls": [
        ("cat", ["cat"], 1),
        ("Cat ", ["cAt"], 1),
        ("cut", ["cat"], 2 / 3),  # one of three letters
        ("sitting", ["kitten"], 4 / 7),  # distance 3, longer length 7
        ("ab", ["ax"], 0),  # NL = 0.5 is not below the threshold
        ("hello", ["hello world"], 0),  # 6 / 11
        ("hello worl", ["hello world"], 10 / 11),
        ("cat", ["dog", "cap", "cat"], 1),
        ("new  york", ["New York"], 1),
        ("cat   ", ["cow"], 0),  # 2 / 3, blanks at the ends do not count
        ("", ["cat"], 0),
    ],
    "anls-lmms": [
        ("cat", ["cat"], 1),
        ("cut", ["cat"], 2 / 3),
        ("ab", ["ax"], 0.5),
        ("hello", ["hello world"], 0),
        ("cat   ", ["cow"], 1 - 2 / 6),  # the three blanks count in the length
        ("new  york", ["New York"], 1),
        ("cat", ["dog", "cap"], 2 / 3),
        ("", ["cat"], 0),
    ],
    "relaxed": [
        ("105", ["100"], 1),
        ("105.1", ["100"], 0),
        ("95", ["100"], 1),
        ("94.9", ["100"], 0),
        ("-3", ["3"], 0),
        ("-3.1", ["-3"], 1),
        ("12%", ["0.12"], 1),
        ("12%", ["12"], 0),
        ("Blue", ["blue"], 1),
        ("blue ", ["blue"], 1),
        ("blues", ["blue"], 0),
        ("0.0", ["0"], 1),
        ("0.01", ["0"], 0),
        ("1,000", ["1000"], 0),  # a comma makes it a word
        ("nan", ["NaN"], 1),
        ("inf", ["5"], 0),
        ("7", ["seven", "7.2"], 1),
    ],
    "ocr": [
        ("The sign says STOP.", ["stop"], 1),
        ("stop", ["STOP"], 1),
        ("sto p", ["stop"], 0),
        ("it reads open\nnow", ["open now"], 1),
        ("\uff2f\uff30\uff25\uff2e", ["open"], 1),  # "OPEN" in full-width letters
        ("closed", ["open", "close"], 1),
        ("", ["open"], 0),
        ("anything", [" "], 0),  # an empty reference is in every answer
    ],
    "pope": [
        ("Yes", ["yes"], 1),
        ("yes, there is a dog", ["yes"], 1),
        ("No.", ["no"], 1),
        ("no", ["yes"], 0),
        ("There is no dog", ["no"], 0),  # the first word says neither
        ("Not at all", ["no"], 0),
        ("yesterday", ["yes"], 0),
        ("", ["no"], 0),
        ("**Yes**", ["yes"], 1),
    ],
    "pope-whole": [
        ("Yes", ["yes"], 1),
        (" no\n", ["no"], 1),
        ("yes, there is a dog", ["yes"], 0),
        ("No.", ["no"], 0),
        ("no", ["yes"], 0),
        ("", ["no"], 0),
        ("YES", ["Yes"], 1),
        ("maybe", ["no"], 0),
    ],
    "choice": [
        ("B", ["B"], 1),
        ("b", ["B"], 1),
        ("(B)", ["B"], 1),
        ("B. a dog", ["B"], 1),
        ("B) a dog", ["B"], 1),
        ("The answer is B.", ["B"], 1),
        ("Answer: b", ["B"], 1),
        ("A dog", ["A"], 0),  # an article
        ("The answer is a dog", ["A"], 0),
        ("the correct answer is (b)", ["B"], 1),
        ("Option B because it barks", ["B"], 1),
        ("Because of B", ["B"], 0),
        ("C", ["B"], 0),
        ("", ["B"], 0),
    ],
}


@pytest.mark.parametrize(("text", "expected"), NORMALIZED)
def test_vqa_normaliser(text, expected):
    assert vqa_normalizer.normalize(text) == expected


def test_every_metric_has_golden_pairs():
    assert set(GOLDEN) == set(METRICS)
    assert all(len(pairs) >= 8 for pairs in GOLDEN.values())


@pytest.mark.parametrize(
    ("name", "prediction", "references", "expected"),
    [(name, *pair) for name, pairs in GOLDEN.items() for pair in pairs],
)
def test_golden_pairs(name, prediction, references, expected):
    found = metric(name).score(prediction, references)
    assert isinstance(found, float)
    assert found == pytest.approx(expected, abs=1e-12)


def test_order_of_references_does_not_count():
    for name in ("vqa", "vqa-always", "vqa-evalai", "anls", "anls-lmms", "ocr"):
        answers = ["cat", "a cat", "cats", "the Cat", "dog"]
        scores = {metric(name).score("cat", answers[i:] + answers[:i]) for i in range(5)}
        assert len(scores) == 1, name


def test_names():
    for name, found in METRICS.items():
        assert found.name == name and found.note
        with pytest.raises(ValueError):
            found.score("yes", [])
    with pytest.raises(ValueError, match=r"unknown metric 'bleu'; one of one-word, exact-match"):
        metric("bleu")
    with pytest.raises(ValueError, match="ranks captions"):
        metric(metrics.RECALL)


@pytest.mark.parametrize(
    ("name", "references", "why"),
    [
        ("vqa", ["cat"] * 3, "four or more people, not 3"),
        ("vqa-evalai", ["cat"], "four or more people, not 1"),
        ("pope", ["maybe"], '"yes" or "no"'),
        ("pope-whole", ["yes", "no"], '"yes" or "no"'),
        ("choice", ["a dog"], "letter of the right option"),
    ],
)
def test_references_that_nothing_could_match_are_refused(name, references, why):
    with pytest.raises(ValueError, match=why):
        metric(name).score("cat", references)
    with pytest.raises(ValueError, match=why):
        metric(name).check(references)


def test_pope_summary():
    said = ["Yes, a dog.", "yes", "no", "There is one", "No", "yes"]
    truth = [["yes"], ["no"], ["yes"], ["yes"], ["no"], ["yes"]]
    # Read: yes yes no - no yes. Hits on "yes": the 1st and the 6th; said three times, true four.
    found = metric("pope").summary(said, truth)
    assert found == pytest.approx(
        {
            "accuracy": 3 / 6,
            "precision": 2 / 3,
            "recall": 2 / 4,
            "f1": 4 / 7,  # 2 * (2/3) * (1/2) / (2/3 + 1/2) = (2/3) / (7/6)
            "yes_rate": 3 / 6,
            "unread": 1 / 6,
        }
    )
    score = metric("pope").score
    assert found["accuracy"] == sum(score(p, r) for p, r in zip(said, truth)) / 6
    # As whole answers: - yes no - - yes, where "No" is whole too.
    whole = metric("pope-whole").summary(said, truth)
    assert whole["yes_rate"] == pytest.approx(2 / 6) and whole["unread"] == pytest.approx(2 / 6)


def test_pope_summary_without_a_yes():
    found = metric("pope").summary(["no", "no"], [["no"], ["no"]])
    assert found["accuracy"] == 1
    assert found["precision"] == found["recall"] == found["f1"] == found["yes_rate"] == 0


def test_recall_counts_any_positive():
    # Images 0 and 1, captions 0..3: of image 0 are 0 and 1, of image 1 are 2 and 3.
    similarity = torch.tensor([[0.1, 0.9, 0.8, 0.0], [0.9, 0.5, 0.1, 0.4]])
    # Image 0: best caption is 1, its own. Image 1: own captions come third and fourth.
    assert recall_at_k(similarity, [(0, 1), (2, 3)], (1, 2, 3)) == {1: 0.5, 2: 0.5, 3: 1.0}
    # The other way: captions 0 and 2 rank the wrong image first, 1 and 3 the right one.
    assert recall_at_k(similarity.T, [(0,), (0,), (1,), (1,)], (1, 2)) == {1: 0.5, 2: 1.0}
    hits = hits_at_k(similarity, [(0, 1), (2, 3)], (2, 3))
    assert hits[2].tolist() == [True, False] and hits[3].tolist() == [True, True]


def test_ties_go_to_the_lower_index_and_k_may_exceed_the_gallery():
    flat = torch.zeros(3, 3)  # a broken encoder must not look perfect
    assert recall_at_k(flat, [(0,), (1,), (2,)], (1, 2, 9)) == {1: 1 / 3, 2: 2 / 3, 9: 1.0}


def test_ranks_are_those_of_a_stable_sort():
    generator = torch.Generator().manual_seed(0)
    similarity = torch.randint(0, 6, (40, 25), generator=generator).float()  # many ties
    sets = [torch.randperm(25, generator=generator)[: 1 + q % 5].tolist() for q in range(40)]
    order = similarity.argsort(dim=1, descending=True, stable=True).tolist()
    hits = hits_at_k(similarity, sets, (1, 3, 10, 25))
    for k, hit in hits.items():
        assert hit.tolist() == [bool(set(o[:k]) & set(s)) for o, s in zip(order, sets)]
    assert 0 < hits[1].sum() < hits[10].sum() < 40 == hits[25].sum()


def test_rankings_refuse_what_cannot_be_ranked():
    for similarity, positives, ks, why in [
        (torch.zeros(2, 3), [(0,)], (1,), "row for each"),
        (torch.zeros(3), [(0,)] * 3, (1,), "queries, gallery"),
        (torch.zeros(0, 3), [], (1,), "queries, gallery"),
        (torch.zeros(1, 3), [()], (1,), "query 0 has no positives"),
        (torch.zeros(1, 3), [(0,)], (0,), "k starts at 1"),
        (torch.full((1, 3), torch.nan), [(0,)], (1,), "NaN"),
    ]:
        with pytest.raises(ValueError, match=why):
            recall_at_k(similarity, positives, ks)


def test_top_k_accuracy():
    logits = torch.tensor([[3.0, 2, 1], [1, 3, 2], [1, 2, 3], [3, 1, 2]])
    # Ranks of the labels: 0, 1, 2, 0.
    labels = torch.tensor([0, 2, 0, 0])
    assert top_k_accuracy(logits, labels, (1, 2, 3)) == {1: 0.5, 2: 0.75, 3: 1.0}


def test_agreement():
    assert agreement(["red", "2 ", "no"], ["red", "2", "yes"]) == pytest.approx(2 / 3)
    assert agreement(["Red"], ["red"]) == 0
    with pytest.raises(ValueError):
        agreement([], [])
    with pytest.raises(ValueError):
        agreement(["red"], ["red", "blue"])


def test_kl_divergence_by_hand():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1], [1.0, 0.0]])
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1], [0.5, 0.5]])
    # 0.5 ln 2 + 0.5 ln (2/3); 0; ln 2, where 0 ln 0 is 0.
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0, math.log(2)]
    assert kl_divergence(p.log(), q.log()).tolist() == pytest.approx(expected, abs=1e-7)
    assert kl_divergence(q.log(), p.log())[2] == math.inf  # p rules out what q does not


def test_kl_divergence_of_logits_is_fp32_and_never_negative():
    logits = 8 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    found = kl_divergence(logits, logits + 3)  # logits are normalised: a shift is nothing
    assert found.dtype == torch.float32 and found.shape == (64,)
    assert (found >= 0).all() and found.max() < 1e-5
    half = kl_divergence(logits.bfloat16(), logits.flip(-1).bfloat16())
    exact = torch.nn.functional.kl_div(
        logits.flip(-1).bfloat16().double().log_softmax(-1),
        logits.bfloat16().double().log_softmax(-1),
        log_target=True,
        reduction="none",
    ).sum(-1)
    assert torch.allclose(half.double(), exact, rtol=1e-5)
