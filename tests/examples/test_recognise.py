"""Word error rates and greedy decoding."""

import math

import pytest
import torch

for needed in ("transformers", "tokenizers", "jiwer"):
    pytest.importorskip(needed, reason="the speech example needs the extra: pip install 'ssvdo_kernels[asr]'")

from transformers import WhisperConfig, WhisperForConditionalGeneration

from examples.asr.recognise import Errors, cast_once, normalise, transcribe, wer
from examples.asr.whisper import FRAMES, PROMPTS, SECONDS, config_of


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (" The Kettle,  boiled! ", "the kettle boiled"),
        ("Don\u2019t stop", "don't stop"),
        ("A well-known \u2013 song (live)", "a well known song live"),
        ("...", ""),
        ("snake_case `x` = 2", "snake case x 2"),
        ("Un CAFE\u0301 crème, naïve", "un café crème naïve"),
        ("Привет, мир!", "привет мир"),
        ("你好，世界。", "你好 世界"),
        ("हिन्दी।", "हिन्दी"),  # marks belong to their letters
        ("\uff26\uff55\uff4c\uff4c \ufb01t", "full fit"),
        ("м\u02bcята don＇t", "м'ята don't"),
        ("می\u200cخواهم so\u00adft", "میخواهم soft"),  # joiners show nothing
        ("a\u200bb", "a b"),
        ("love \u2764\ufe0f \u00b4 \u0301x", "love x"),  # a mark without a letter is nothing
    ],
)
def test_normaliser(text, plain):
    assert normalise(text) == plain


def test_wer_is_in_percent_over_all_words():
    assert wer(["One two three four."], ["one TWO three four"]) == 0
    assert wer(["one two three four", "five six seven eight"], ["one two tree four", "five six seven eight"]) == 12.5
    assert wer(["one two"], ["one two and three more words"]) == 200
    assert wer(["one two"], [""]) == 100


@pytest.mark.parametrize("said", ["привет мир", "你好 世界", "नमस्ते दुनिया"])
def test_words_of_every_script_count(said):
    assert wer([said], ["one two"]) == Errors.count([said], ["one two"]).wer == 100
    assert wer([said], [said.upper() + "."]) == Errors.count([said], [said]).cer == 0


def test_accents_count():
    assert wer(["café"], ["caf"]) == wer(["café"], ["cafe"]) == 100


@pytest.mark.parametrize("rate", [wer, Errors.count])
@pytest.mark.parametrize(
    ("said", "message"),
    [(["one", "..."], r"references\[1\]='\.\.\.' has no words; allowed: at least one letter or digit"),
     ([""], r"references\[0\]=''"), (["\u2764\ufe0f"], r"references\[0\]"), (["'"], r"references\[0\]"),
     ([], "references is empty; at least one is needed")],
)  # fmt: skip
def test_references_without_words_are_refused(rate, said, message):
    with pytest.raises(ValueError, match=message):
        rate(said, list(said))


class Numbers:
    def decode(self, ids):
        return " " + " ".join(map(str, ids))


@pytest.mark.parametrize("size", ["tiny.en", "base"])
def test_transcripts_do_not_depend_on_the_batch_and_hold_no_special_token(size):
    torch.manual_seed(0)
    small = {**config_of(size).to_dict(), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32, "init_std": 0.5}  # fmt: skip
    model = WhisperForConditionalGeneration(WhisperConfig(**small)).eval().double()
    prompt = PROMPTS[small["vocab_size"]]
    seen: list[float] = []

    def end(module, hidden, scores):  # random weights: by what the decoder says, which differs by utterance and step
        seen.extend(hidden[0][:, 0].tolist())
        scores[:, prompt.end] = torch.where(hidden[0][:, 0] > bound, 1e9, -1e9)

    model.proj_out.register_forward_hook(end)
    mel, bound = torch.randn(9, 80, 2 * SECONDS * FRAMES).double() * 3 * torch.randn(9, 80, 1), math.inf
    for m in mel:
        transcribe(model, Numbers(), m[None], limit=6)
    bound = sorted(seen)[3 * len(seen) // 4] + 1e-6
    alone = [transcribe(model, Numbers(), m[None], limit=6)[0] for m in mel]
    lengths = [len(line.split()) for line in alone]
    assert len(set(lengths)) > 2 and sum(n < 6 for n in lengths) > 4, lengths  # some end early: they leave the batch
    for size in (2, 9):
        assert transcribe(model, Numbers(), mel, size=size, limit=6) == alone
    tokens = [int(t) for line in alone for t in line.split()]
    assert tokens and max(tokens) < prompt.start[0] and prompt.end not in tokens


@pytest.mark.parametrize("frozen", [True, False])
def test_casting_once_is_what_autocast_does_for_each_token(frozen):
    torch.manual_seed(0)
    small = {**config_of("tiny.en").to_dict(), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32}  # fmt: skip
    model = WhisperForConditionalGeneration(WhisperConfig(**small)).eval().requires_grad_(not frozen)
    weights = dict(model.named_parameters())
    mel, tokens = torch.randn(2, 80, 2 * SECONDS * FRAMES), torch.tensor([[3, 4], [5, 6]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(mel, decoder_input_ids=tokens).logits
        with cast_once(model):
            halves = {p.dtype for p in model.parameters()}
            assert torch.equal(model(mel, decoder_input_ids=tokens).logits, expected)
    assert (torch.bfloat16 in halves) is frozen
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in weights.items())
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    with cast_once(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_loops_and_deletions_are_told_apart():
    errors = Errors.count(["one two", "one two three"], ["one two " * 5, "one"])
    assert errors.words_wrong == [8, 2] and errors.words_deleted == [0, 2]
    assert (errors.wer, errors.capped, errors.deletions) == pytest.approx((200, 80, 40))


def test_errors_are_counted_per_utterance():
    said, heard = ["One two three four.", "a b", "go on"], ["one too three four", "a b", "we go on now"]
    errors = Errors.count(said, heard)
    assert (errors.words_wrong, errors.words) == ([1, 0, 2], [4, 2, 2])
    assert (errors.characters_wrong, errors.characters) == ([1, 0, 7], [18, 3, 5])
    assert errors.wer == pytest.approx(wer(said, heard)) == pytest.approx(37.5)
    assert errors.cer == pytest.approx(100 * 8 / 26)
    assert Errors.count(["one two"], [""]).words_wrong == [2]
