"""What recordings go through: the telephone, another tempo, noise."""

import math

import pytest
import torch

for needed in ("transformers", "tokenizers", "soundfile"):
    pytest.importorskip(needed, reason="the speech example needs the extra: pip install 'ssvdo_kernels[asr]'")

import soundfile

from examples.asr.corpus import Utterance, features
from examples.asr.readers import Corpus, open_corpus
from examples.asr.shifts import RATE, SHIFTS, noise, shifted, telephone


def tone(hertz, seconds=0.5, height=0.5):
    return height * torch.sin(2 * math.pi * hertz * torch.arange(int(seconds * RATE)) / RATE)


def rms(audio):
    return audio[400:-400].square().mean().sqrt()


def test_a_telephone_passes_voice_and_nothing_above_4_khz():
    assert telephone(tone(1000)).shape == (RATE // 2,)
    assert torch.allclose(telephone(tone(1000))[400:-400], tone(1000)[400:-400], atol=0.02)
    assert rms(telephone(tone(6000))) < 0.01 * rms(tone(6000))


def test_mu_law_errs_in_proportion():
    """Its 256 levels are a few percent of the signal apart, loud or quiet; 256 even ones would be 1/128 apart."""
    for height in (0.5, 0.005):
        error = rms(telephone(tone(440, height=height)) - tone(440, height=height))
        assert 0.002 < error / rms(tone(440, height=height)) < 0.03, height


def test_tempo_moves_length_and_pitch():
    for name, factor in (("slow", 0.85), ("fast", 1.2)):
        got = shifted(tone(440), name)
        assert got.numel() == int(RATE // 2 * RATE / round(RATE * factor))
        expected = torch.sin(2 * math.pi * 440 * factor * torch.arange(got.numel()) / RATE) / 2
        assert torch.allclose(got[400:1600], expected[400:1600], atol=1e-3)


def test_noise_is_as_loud_as_asked_and_the_same_each_time():
    added = noise(tone(440), 10.0) - tone(440)
    assert 20 * torch.log10(rms(tone(440)) / rms(added)) == pytest.approx(10, abs=0.3)
    assert torch.equal(noise(tone(440), 10.0), noise(tone(440), 10.0))


def test_a_shifted_voice_has_the_same_utterances_and_other_features():
    corpus = open_corpus("committed")
    plain, heard = (corpus.of(v, "test")[:1] for v in ("child", "child@telephone"))
    assert (heard[0].path, heard[0].text, heard[0].shift) == (plain[0].path, plain[0].text, "telephone")
    difference = (features(heard) - features(plain)).abs()
    assert difference[0, 75:].mean() > 3 * difference[0, 5:40].mean() > 0  # the highest bands are gone


def test_an_unknown_shift_is_refused():
    with pytest.raises(ValueError, match=r"shift='fax' is unknown; allowed: 'telephone', 'slow', 'fast', 'noise'"):
        shifted(tone(440), "fax")
    path = open_corpus("committed").of("child", "test")[0].path
    with pytest.raises(ValueError, match="shift='fax'"):
        features([Utterance(path, "hi", shift="fax")])
    with pytest.raises(ValueError, match="voice 'nobody' has no utterance"):
        Corpus(()).of("nobody@noise", "test")


def test_what_a_shift_makes_too_long_is_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(440, 0.95).numpy(), RATE)
    assert features([Utterance(tmp_path / "a.wav", "hi")], 1).shape == (1, 80, 100)
    with pytest.raises(ValueError, match=r"a\.wav: 1\.1 s long; the context holds 1 s"):
        features([Utterance(tmp_path / "a.wav", "hi", shift="slow")], 1)


def test_every_shift_keeps_finite_samples():
    for name in SHIFTS:
        assert shifted(tone(440), name).isfinite().all()
