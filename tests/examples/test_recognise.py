"""Word error rates and greedy decoding."""

import pytest
import torch

for needed in ("transformers", "tokenizers", "jiwer"):
    pytest.importorskip(needed, reason="the speech example needs the extra: pip install 'ssvdo_kernels[asr]'")

from transformers import WhisperConfig, WhisperForConditionalGeneration  # noqa: E402

from examples.asr.recognise import normalise, transcribe, wer  # noqa: E402
from examples.asr.whisper import END, POSITIONS, START, tiny_config  # noqa: E402


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (" The Kettle,  boiled! ", "the kettle boiled"),
        ("Don\u2019t stop", "don't stop"),
        ("A well-known \u2013 song (live)", "a well known song live"),
        ("...", ""),
    ],
)
def test_normaliser(text, plain):
    assert normalise(text) == plain


def test_wer_is_in_percent_over_all_words():
    assert wer(["One two three four."], ["one TWO three four"]) == 0
    assert wer(["one two three four", "five six seven eight"], ["one two tree four", "five six seven eight"]) == 12.5
    assert wer(["one two"], ["one two and three more words"]) == 200
    assert wer(["one two"], [""]) == 100


class Numbers:
    def decode(self, ids):
        return " " + " ".join(map(str, ids))


def test_transcripts_do_not_depend_on_the_batch_and_hold_no_special_token():
    torch.manual_seed(0)
    small = {**tiny_config().to_dict(), "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
             "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
             "decoder_ffn_dim": 32}  # fmt: skip
    model = WhisperForConditionalGeneration(WhisperConfig(**small)).eval()
    with torch.no_grad():
        model.proj_out.weight[END] *= 0  # random weights: end now and then, not at once
    mel = torch.randn(5, 80, 2 * POSITIONS)
    alone = [transcribe(model, Numbers(), m[None], limit=6)[0] for m in mel]
    together = transcribe(model, Numbers(), mel, size=2, limit=6)
    assert together == alone and len(together) == 5
    tokens = [int(t) for line in together for t in line.split()]
    assert tokens and max(tokens) < START and END not in tokens
