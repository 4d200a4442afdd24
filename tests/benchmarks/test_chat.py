# SPDX-License-Identifier: Apache-2.0
"""Chats with images on a mini model: prompts, batches, likelihoods, what is counted and refused."""

from __future__ import annotations

from dataclasses import replace

import mini_qwen
import pytest
import torch
from chats import TEMPLATE, made, picture, qwen_processor

import vtc
from vtc.benchmarks.accuracy.answering import answer_batch
from vtc.benchmarks.harnesses.chat import ChatModel, chat_prompt, images_of, summarize, user_turn
from vtc.benchmarks.shared import prompts
from vtc.benchmarks.support.mini_models import mini_llava, mini_processor
from vtc.benchmarks.tasks.items import Item
from vtc.methods.fastv import FastV
from vtc.methods.prefixkv import PrefixKV
from vtc.methods.tome import ToMe
from vtc.methods.visionzip import VisionZip
from vtc.transformers_contract import cache_left, giving

GREEDY = {"max_new_tokens": 5, "do_sample": False}
METHODS = [None, VisionZip(keep_tokens=4), FastV(keep_tokens=4, k=1), PrefixKV(keep_tokens=4)]


def chats() -> list:
    """Of one image, two images, none, and one again with a longer question."""
    return [
        user_turn([picture(0)], "what colour ?"),
        user_turn([picture(1), picture(2)], "is there a red circle ?"),
        user_turn([], "what shape is a square ?"),
        user_turn([picture(3)], "is there a blue square what shape colour ?"),
    ]


def test_a_tokenizer_without_padding_pads_with_its_end():
    model = mini_llava()
    processor = mini_processor(model)
    processor.tokenizer.pad_token = None
    ends = processor.tokenizer.eos_token
    ChatModel(model, processor)
    assert processor.tokenizer.pad_token == ends is not None


# ---- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_one_question_reads_as_in_vtc_bench(template):
    processor = mini_processor(mini_llava())
    processor.chat_template = template
    chat = user_turn([picture(0)], "what colour ?")
    assert chat_prompt(processor, chat) == prompts.prompt_of(processor, "what colour ?")


def test_turns_and_images_keep_their_order_without_a_template():
    processor = mini_processor(mini_llava())
    first, second = picture(0), picture(1)
    chat = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        *user_turn([first], "what shape ?"),
        {"role": "assistant", "content": [{"type": "text", "text": "square"}]},
        {"role": "user", "content": [{"type": "text", "text": "and "}, *user_turn([second], "?")[0]["content"]]},
    ]  # fmt: skip
    assert chat_prompt(processor, chat) == (
        "Be brief. USER: <image>\nwhat shape ? ASSISTANT: square USER: and <image>\n? ASSISTANT:"
    )
    assert images_of(chat) == [first, second]


def test_videos_are_refused_by_name():
    chat = [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}]
    with pytest.raises(vtc.UnsupportedError, match="video in a prompt"):
        made().answer([chat], **GREEDY)


def test_a_template_that_writes_the_start_token_gets_no_second_one():
    model = made()
    model.processor.tokenizer._tokenizer.post_processor = None
    chat = user_turn([picture(0)], "what colour ?")
    plain = model.inputs([chat])["input_ids"]
    from tokenizers.processors import TemplateProcessing

    model.processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    with_start = model.inputs([chat])["input_ids"]
    assert with_start[0, 0] == 1 and with_start[0, 1:].tolist() == plain[0].tolist()
    model.processor.chat_template = "<s> " + TEMPLATE
    assert (model.inputs([chat])["input_ids"] == 1).sum() == 1


# ---- answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_batch_answers_as_its_prompts_alone_do(method):
    """Left padding, several images, none: the same answers, in order, in fewer batches."""
    model = made(method)
    together = model.answer(chats(), **GREEDY)
    assert len(model.facts) == 2  # with images and without
    alone = [model.answer([chat], **GREEDY)[0] for chat in chats()]
    assert together == alone
    assert len({answer.text for answer in together}) > 1, "no teeth"


def test_answers_are_those_of_vtc_bench():
    model = made()
    items = [Item(picture(i), q, "", "") for i, q in enumerate(("what colour ?", "is there a ?"))]
    (batch,) = prompts.make_batches(model.processor, items, 2)
    answers = model.answer([user_turn([i.image], i.question) for i in items], **GREEDY)
    assert [a.text for a in answers] == answer_batch(model.model, model.processor, batch, 5)


def test_images_may_be_files(tmp_path):
    picture(0).save(tmp_path / "a.png")
    model = made()
    given = [user_turn([image], "what shape ?") for image in (picture(0), str(tmp_path / "a.png"))]
    one, two = model.answer(given, **GREEDY)
    assert one == two


def test_tokens_are_counted_without_padding_and_up_to_the_end():
    model = made()
    (want,) = model.answer([chats()[0]], max_new_tokens=5, do_sample=False)
    # image placeholders, and the words: USER: what colour ? ASSISTANT:
    assert want.input_tokens == 16 + 5 and want.output_tokens == 5
    inputs = model.inputs([chats()[0]])
    new = model.model.generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :].tolist()
    model.model.generation_config.eos_token_id = [new[2], 62]
    stop = new.index(new[2]) + 1
    assert model.answer([chats()[0]], **GREEDY)[0].output_tokens == stop
    answers = model.answer(chats()[:2], **GREEDY)  # the other one goes on; padding behind the end
    assert answers[0].output_tokens == stop and answers[0].input_tokens == want.input_tokens
    assert answers[1].input_tokens == 2 * 16 + 8
    assert model.facts[-1].tokens == sum(a.output_tokens for a in answers)


def test_several_answers_to_a_prompt_are_refused():
    with pytest.raises(ValueError, match="num_return_sequences"):
        made().answer(chats()[:1], max_new_tokens=2, num_beams=2, num_return_sequences=2)


def test_beams_run_compressed():
    model = made(VisionZip(keep_tokens=4))
    model.answer([chats()[0]], num_beams=3, **GREEDY)
    assert model.facts[0].report.final_tokens == 4 and model.facts[0].samples == 1


# ---- honesty -------------------------------------------------------------------------------------


def test_a_stock_model_is_left_alone():
    model = made()
    model.answer(chats(), **GREEDY)
    hooks = [
        h
        for m in model.model.modules()
        for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    ]
    assert not [h for h in hooks if getattr(h, "__module__", "").startswith("vtc")]
    assert "vtc" not in model.model.__dict__ and model.session is None
    assert all(facts.report is None for facts in model.facts)
    assert set(summarize(model.facts)) == {"ttft", "tpot"}


def test_summary_is_the_mean_over_the_samples():
    model = made(VisionZip(keep_tokens=4))
    model.answer(chats(), **GREEDY)  # 1 + 2 + 0 + 1 images
    model.answer(chats()[:1], **GREEDY)
    found = summarize(model.facts)
    assert found["visual_tokens"] == pytest.approx((16 + 32 + 16 + 16) / 4)
    assert found["final_tokens"] == pytest.approx((4 + 8 + 4 + 4) / 4)
    assert found["tokens_per_layer"] == pytest.approx(found["final_tokens"])
    assert found["kv_tokens"] == pytest.approx(found["final_tokens"])
    full = [facts.report for facts in model.facts if facts.report]
    assert found["kv_bytes"] == pytest.approx(sum(r.kv_bytes for r in full) / 4)
    assert 0.1 < found["flops_share"] < 0.5 < found["flops_all_share"] < 1
    assert 0 < found["kv_share"] < 1
    for facts in model.facts:
        assert 0 < facts.first < facts.seconds


@pytest.mark.parametrize("wrong", [{"asked": 3.0}, {"final_tokens": 1.0}, {"kv_tokens": 1.0}])
def test_tokens_that_were_not_asked_for_end_the_run(monkeypatch, wrong):
    model = made(VisionZip(keep_tokens=4))
    real = model.session.report
    monkeypatch.setattr(model.session, "report", lambda: replace(real(), **wrong))
    model.answer([chats()[2]], **GREEDY)  # no image, nothing to check
    with pytest.raises(RuntimeError, match=r"asked for \d visual tokens and kept \d of 16"):
        model.answer([chats()[0]], **GREEDY)


def test_methods_without_a_budget_run():
    model = made(ToMe(r=2))
    model.answer(chats()[:1], **GREEDY)
    assert model.facts[0].report.asked is None


# ---- likelihoods ---------------------------------------------------------------------------------

CHOICES = [" red", " blue square", " no", " a circle is red ?"]


@torch.no_grad()
def slow_loss(model: ChatModel, chat, text: str) -> tuple[float, bool]:
    """Token by token behind a prefill of the prompt, batch 1."""
    inputs, prompt = model.inputs([chat]), chat_prompt(model.processor, chat)
    ids = model.processor.tokenizer(prompt + text)["input_ids"]
    ids = ids[len(model.processor.tokenizer(prompt)["input_ids"]) :]
    out = model.model(**inputs, use_cache=True)
    losses, greedy = [], True
    for token in ids:
        log_p = out.logits[0, -1].log_softmax(-1)
        losses.append(-log_p[token].item())
        greedy &= log_p.argmax().item() == token
        out = model.model(input_ids=torch.tensor([[token]]), **giving(model.model, cache_left(out)))
    return sum(losses) / len(losses), greedy


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_losses_are_those_of_decoding_one_by_one(method):
    """Prompts and continuations of all lengths in one batch; a penalty changes no likelihood."""
    model = made(method)
    model.model.generation_config.repetition_penalty = 1.5
    pairs = [(chat, text) for text in CHOICES for chat in chats()]
    found = model.losses([chat for chat, _ in pairs], [text for _, text in pairs])
    for (loss, greedy), (chat, text) in zip(found, pairs):
        want = slow_loss(model, chat, text)
        assert (loss, greedy) == (pytest.approx(want[0], abs=1e-4), want[1])
    with_images, without = (facts.report for facts in model.facts)
    assert without is None and model.facts[0].tokens == 0
    if method is not None:
        kept = min(with_images.final_tokens, with_images.kv_tokens)
        assert kept == pytest.approx(with_images.asked)


def test_continuations_have_no_say_in_what_is_kept():
    """FastV asks the last token of the prompt: the same patches as when the model itself
    answers."""
    model, chat = made(FastV(keep_tokens=4, k=1)), chats()[0]
    model.answer([chat], **GREEDY)
    model.losses([chat] * 2, [" red", " is there a circle ?"])
    free, forced = (facts.report.kept for facts in model.facts)
    assert [k.tolist() for k in forced] == [k.tolist() for k in free] * 2


def test_a_continuation_that_the_model_may_not_write_is_refused():
    model = made()
    model.model.generation_config.suppress_tokens = [
        model.processor.tokenizer("red")["input_ids"][0]
    ]
    with pytest.raises(vtc.UnsupportedError, match="forbid a token"):
        model.losses(chats()[:1], [" red circle"])


def test_what_greedy_decoding_writes_is_greedy():
    model, chat = made(FastV(keep_tokens=4, k=1)), chats()[0]
    words = {i: w for w, i in model.processor.tokenizer.get_vocab().items()}
    (answer,) = model.answer([chat], max_new_tokens=1, do_sample=False)
    inputs = model.inputs([chat])
    first = model.model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1].item()
    if first not in words or words[first].startswith("<"):
        pytest.fail("choose another seed: the answer is no word")
    (loss, greedy), (_, other) = model.losses([chat] * 2, [" " + words[first], " no no"])
    assert greedy and not other and answer.text == words[first] and loss > 0


def test_a_choice_without_tokens_is_refused():
    with pytest.raises(ValueError, match="without tokens"):
        made().losses(chats()[:2], [" red", ""])


@pytest.mark.parametrize("method", [None, FastV(keep_tokens=4, k=1)], ids=str)
def test_images_of_any_size(method):
    model = mini_qwen.build("qwen2.5")
    model.generation_config.update(eos_token_id=59, pad_token_id=0)
    chat_model = ChatModel(model, qwen_processor(), method)
    shown = [
        user_turn([picture(0).resize((40, 32))], "what colour ?"),
        user_turn([picture(1).resize((24, 64)), picture(2)], "is there a red circle ?"),
        user_turn([], "what shape ?"),
    ]
    together = chat_model.answer(shown, **GREEDY)
    assert together == [chat_model.answer([chat], **GREEDY)[0] for chat in shown]
    for text in (" red", " blue square ?"):
        for chat, (loss, greedy) in zip(shown[:2], chat_model.losses(shown, [text] * 3)):
            want = slow_loss(chat_model, chat, text)
            assert (loss, greedy) == (pytest.approx(want[0], abs=1e-4), want[1])
    if method is not None:
        assert summarize(chat_model.facts)["final_tokens"] == pytest.approx((4 + 8) / 2)
