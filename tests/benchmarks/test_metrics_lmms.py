# SPDX-License-Identifier: Apache-2.0
"""Metrics beside lmms-eval's own functions: equal on random answers, and where they differ."""

import copy
import re
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vtc.benchmarks.metrics import vqa_normalizer
from vtc.benchmarks.metrics.scores import metric

pytestmark = pytest.mark.slow  # importing lmms_eval.tasks takes seconds

WORDS = ["a", "An", "the", "none", "two", "Ten", "2", "10", "3.5", "1,000", "12%", "0.12", "-7"]
WORDS += ["dont", "couldnt've", "somebody'd", "dog's", "its", "t-shirt", "yes", "No", "Red", "Köln"]
WORDS += [
    "what?!",
    "U.S.A.",
    "m/s",
    "(left)",
    "[x]",
    "A.",
    "B",
    "\uff2f\uff30\uff25\uff2e",
    "İ",
    "ß",
    "上海",
]
GLUE = ["", " ", ", ", "-", ".", "\n", "\t ", "'", "  ", "_", ",", ",,"]
EXAMPLES = 320

pieces = st.lists(st.sampled_from(WORDS + GLUE) | st.text(max_size=3), max_size=9)
texts = pieces.map("".join)
"""Answers of words and glue, with fewer than 32 periods; lmms-eval counts them (see below)."""


def cleaned(text):
    return " ".join(text.split())


@st.composite
def answered(draw, n=10):
    """A prediction and n references, of a few different ones so that there are matches."""
    some = draw(st.lists(texts, min_size=1, max_size=4))
    answers = draw(st.lists(st.sampled_from(some), min_size=n, max_size=n))
    near = st.sampled_from(some).map(lambda t: draw(st.sampled_from([t, t.upper(), f"the {t}."])))
    return draw(near | texts), answers


@pytest.fixture(scope="module")
def lmms():
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed: nothing to compare with")
    from lmms_eval.api import metrics
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor
    from lmms_eval.tasks.chartqa.utils import relaxed_correctness
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results
    from lmms_eval.tasks.pope import utils as pope
    from lmms_eval.tasks.scienceqa.utils import sqa_process_results
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results
    from lmms_eval.tasks.vqav2.utils import vqav2_process_results

    def exact(prediction, reference):
        options = {"ignore_case": True, "ignore_punctuation": True}
        found = metrics.exact_match_fn(predictions=[prediction], references=[reference], **options)
        return float(found["exact_match"])

    def vqav2(prediction, references):
        answers = [{"answer": r, "answer_id": i} for i, r in enumerate(references)]
        doc = {"answers": answers, "question_id": 0}
        return vqav2_process_results(doc, [prediction])["exact_match"]

    def textvqa(prediction, references):
        doc = {"answers": copy.copy(references), "question_id": 0}
        return textvqa_process_results(doc, [prediction])["exact_match"]

    def ocr(prediction, references):
        doc = {"answer": references, "dataset": "", "question_type": ""}
        return ocrbench_process_results(doc, [prediction])["ocrbench_accuracy"]["score"]

    def choice(prediction, letter):
        doc = {"choices": "ABCDE", "answer": "ABCDE".index(letter)}
        return sqa_process_results(doc, [prediction])["exact_match"]

    def pope_of(predictions, references):
        """Each score, and lmms-eval's figures of the set."""
        pairs = list(zip(predictions, references))
        docs = [pope.pope_process_results({"answer": r, "question_id": 0}, [p]) for p, r in pairs]
        names = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
        figures = {
            name: getattr(pope, f"pope_aggregate_{name}")([d["pope_accuracy"] for d in docs])
            for name in names
        }
        return [d["pope_accuracy"]["score"] for d in docs], figures

    return SimpleNamespace(
        evalai=EvalAIAnswerProcessor(),
        contractions=EvalAIAnswerProcessor.CONTRACTIONS,
        punctuation=EvalAIAnswerProcessor.PUNCTUATIONS,
        anls=lambda p, r: metrics.anls(r, [p])["anls"],
        relaxed=lambda p, r: float(relaxed_correctness(p, r)),
        exact=exact,
        vqav2=vqav2,
        textvqa=textvqa,
        ocr=ocr,
        choice=choice,
        pope=pope_of,
    )


def examples(*strategies):
    """The same random examples in every run."""
    several = settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda test: several(given(*strategies)(test))


def test_tables(lmms):
    never_met = {k for k in lmms.contractions if k != k.lower()}
    same = {k for k, v in lmms.contractions.items() if k == v}
    expected = {k: v for k, v in lmms.contractions.items() if k not in never_met | same}
    assert expected == vqa_normalizer.CONTRACTIONS
    assert list(vqa_normalizer.PUNCTUATION) == lmms.punctuation


def test_vqa_normalisers(lmms):
    @examples(texts)
    def equal(text):
        assert vqa_normalizer.normalize_evalai(text) == lmms.evalai(text)
        once = text.replace("\n", " ").replace("\t", " ").strip()
        stripped = lmms.evalai.process_punctuation(once)
        assert vqa_normalizer.strip_punctuation(text) == stripped
        assert vqa_normalizer.normalize(text) == lmms.evalai.process_digit_article(stripped)

    equal()


def test_vqa_scores(lmms):
    seen = set()

    @examples(answered())
    def equal(pair):
        prediction, answers = pair
        always = metric("vqa-always").score(prediction, answers)
        assert always == pytest.approx(lmms.vqav2(prediction, answers), abs=1e-12)
        evalai = metric("vqa-evalai").score(prediction, answers)
        assert evalai == pytest.approx(lmms.textvqa(prediction, answers), abs=1e-12)
        seen.update((always, evalai))

    equal()
    assert {0.0, 1.0} < seen  # and some in between, or the examples would show little


def test_anls(lmms):
    @examples(texts, st.lists(texts, min_size=1, max_size=3))
    def equal(prediction, references):
        references = [*references, prediction[1:]]  # something near
        theirs = lmms.anls(prediction, references)
        assert metric("anls-lmms").score(prediction, references) == pytest.approx(theirs)
        # The paper's form: the same without blanks to count, but for a similarity of 0.5.
        clean, others = cleaned(prediction.lower()), [cleaned(r.lower()) for r in references]
        theirs = lmms.anls(clean, others)
        upper = any(len(t.upper()) != len(t) for t in (clean, *others))  # "ß" is two letters there
        if theirs != 0.5 and not upper:
            assert metric("anls").score(prediction, references) == pytest.approx(theirs)

    equal()


numbers = st.sampled_from(["100", "95", "105", "94.9", "12%", "0.12", "0.125", "-3", "1e2", "7"])
floats = st.floats(-200, 200).map("{:.2f}".format)


def test_relaxed(lmms):
    seen = []

    @examples(numbers | floats | texts, numbers | floats | texts, st.floats(0.9, 1.1))
    def equal(prediction, reference, factor):
        prediction, reference = prediction.strip(), reference.strip()
        near = prediction
        if re.fullmatch(r"-?\d+(\.\d+)?", reference):
            near = f"{float(reference) * factor:.4f}"
        for text in (prediction, near):
            if unlike_numbers(reference):
                continue
            ours = metric("relaxed").score(text, [reference])
            assert ours == lmms.relaxed(text, reference)
            seen.append(ours)

    def unlike_numbers(text):
        try:
            return not 0 < abs(float(text.rstrip("%"))) < float("inf")
        except ValueError:
            return False

    equal()
    assert len(seen) >= 300 and 0 < sum(seen) < len(seen)


def test_exact_match(lmms):
    compared = 0

    @examples(texts, texts)
    def equal(prediction, reference):
        nonlocal compared
        prediction, reference = cleaned(prediction), cleaned(reference)
        # Ends without punctuation, so that none of it leaves a blank at an end.
        for text in (f"x{prediction}x", f"X{reference}x"):
            assert metric("exact-match").score(text, [f"x{reference}x"]) == lmms.exact(
                text, f"x{reference}x"
            )
            compared += 1

    equal()
    assert compared >= 300


def test_ocr(lmms):
    @examples(texts, st.lists(texts.filter(str.strip), min_size=1, max_size=3))
    def equal(prediction, references):
        prediction += references[0] * (len(references) == 2)
        references = [r for r in references if r.strip()]
        assert metric("ocr").score(prediction, references) == lmms.ocr(prediction, references)

    equal()


def test_pope(lmms):
    words = st.sampled_from(["yes", "Yes", " YES\n", "no", "No", "no "])

    @examples(st.lists(st.tuples(words, words), min_size=1, max_size=12))
    def equal(pairs):
        said, truth = zip(*pairs)
        scores, figures = lmms.pope(said, truth)
        references = [[t] for t in truth]
        for name in ("pope", "pope-whole"):
            assert [metric(name).score(p, r) for p, r in zip(said, references)] == scores
            ours = metric(name).summary(said, references)
            assert ours["accuracy"] == pytest.approx(figures["accuracy"])
            assert ours["precision"] == pytest.approx(figures["precision"])
            assert ours["recall"] == pytest.approx(figures["recall"])
            assert ours["f1"] == pytest.approx(figures["f1_score"])

    equal()

    @examples(texts | words, words)
    def equal_each(prediction, reference):
        (theirs,), _ = lmms.pope([prediction], [reference])
        assert metric("pope-whole").score(prediction, [reference]) == theirs

    equal_each()


def test_choice(lmms):
    letters = st.sampled_from("ABCDE")
    forms = st.sampled_from(["{}", "{}. a dog", "{}.", " {} ", "{} dog", "{}{}", "I {}", "{}?"])

    @examples(letters, letters, forms, texts)
    def equal(said, right, form, text):
        for prediction in (form.format(said, right), form.format(said, right).lower()):
            lower = re.match("[a-z][.]", prediction)  # "b. a dog" is the letter here, not there
            if not lower:
                assert metric("choice").score(prediction, [right]) == lmms.choice(prediction, right)
        # On any text: what is right there is right here.
        assert metric("choice").score(text, [right]) >= lmms.choice(text, right)

    equal()


# --------------------------------------------------------------------------- where they differ


def test_the_33rd_period_stays_upstream(lmms):
    """`re.UNICODE` (32) is passed as the count of the substitution."""
    assert lmms.evalai("." * 32) == vqa_normalizer.normalize("." * 32) == ""
    assert lmms.evalai("." * 33) == "." and vqa_normalizer.normalize("." * 33) == ""


def test_official_references_differ_from_lmms(lmms):
    for prediction, references, official, theirs in [
        ("t-shirt", ["t-shirt"] * 10, 0, 1),  # all equal: their punctuation stays
        ("nokia", ["Nokia"] * 9 + ["nokia"], 0.3, 1),  # their case stays
    ]:
        assert metric("vqa").score(prediction, references) == pytest.approx(official)
        assert lmms.vqav2(prediction, references) == pytest.approx(theirs)


def test_anls_differs(lmms):
    assert lmms.anls("ab", ["ax"]) == 0.5 and metric("anls").score("ab", ["ax"]) == 0
    # Blanks lengthen the strings there, and so raise the score.
    assert lmms.anls("cat   ", ["cow"]) == pytest.approx(2 / 3)
    assert metric("anls").score("cat   ", ["cow"]) == 0


def test_relaxed_differs(lmms):
    for prediction, reference in [("0.0", "0"), ("yes ", "yes"), ("nan", "nan"), ("inf", "inf")]:
        assert lmms.relaxed(prediction, reference) == 0
        assert metric("relaxed").score(prediction, [reference]) == 1


def test_exact_match_differs(lmms):
    assert lmms.exact("yes .", "yes") == 0 and metric("exact-match").score("yes .", ["yes"]) == 1
    assert lmms.exact("+", "-") == 1 and metric("exact-match").score("+", ["-"]) == 0


def test_pope_differs(lmms):
    said, truth = ["Yes, a dog.", "There is one", "no"], ["yes", "yes", "no"]
    scores, figures = lmms.pope(said, truth)
    references = [[t] for t in truth]
    assert scores == [0, 0, 1]
    assert [metric("pope").score(p, r) for p, r in zip(said, references)] == [1, 0, 1]
    # Answers that are neither are no misses there; the yes ratio is that of the true answers.
    assert figures["recall"] == 0 and figures["yes_ratio"] == pytest.approx(2 / 3)
    found = metric("pope").summary(said, references)
    assert found["recall"] == 0.5 and found["yes_rate"] == pytest.approx(1 / 3)
    _, figures = lmms.pope(["yes", "There is one"], ["yes", "yes"])
    assert figures["recall"] == 1
    references = [["yes"], ["yes"]]
    assert metric("pope-whole").summary(["yes", "There is one"], references)["recall"] == 0.5


def test_ocr_differs(lmms):
    assert lmms.ocr("anything", [""]) == 1 and metric("ocr").score("anything", [""]) == 0


def test_choice_differs(lmms):
    for text in ("(B)", "b. a dog", "The answer is B", "B)"):
        assert lmms.choice(text, "B") == 0 and metric("choice").score(text, ["B"]) == 1
