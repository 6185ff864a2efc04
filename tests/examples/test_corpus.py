"""Manifests and their errors, audio, features and training batches; the committed sentences and speech."""

import math
import struct
from collections import Counter, defaultdict

import pytest
import torch

for needed in ("transformers", "tokenizers", "soundfile"):
    pytest.importorskip(needed, reason="the speech example needs the extra: pip install 'ssvdo_kernels[asr]'")

import soundfile

from examples.asr.corpus import (
    RATE,
    SPEECH,
    batches,
    features,
    load_audio,
    read_manifest,
)
from examples.asr.make_speech import TEST_SENTENCES, VOICES, sentences
from examples.asr.shifts import resample
from examples.asr.whisper import ENGLISH, MULTILINGUAL, SECONDS


def tone(seconds, rate=RATE, hertz=440.0):
    return 0.5 * torch.sin(2 * math.pi * hertz * torch.arange(int(seconds * rate)) / rate)


def manifest(folder, *lines, audio=("a.flac",)):
    for name in audio:
        soundfile.write(folder / name, tone(0.1).numpy(), RATE)
    (folder / "manifest.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "manifest.tsv"


def test_manifest_is_read(tmp_path):
    path = manifest(
        tmp_path,
        "text\tpath\tvoice\tsplit\tspeaker",
        'Say "hello" twice.\ta.flac\ten-us\ttest\t0053',
        "Good night.\tb.flac\tx\ttrain",
        audio=("a.flac", "b.flac"),
    )
    first, second = read_manifest(path)
    assert (first.path, first.text) == (tmp_path / "a.flac", 'Say "hello" twice.')
    assert (first.speaker, second.speaker) == ("0053", "")
    assert (first.voice, first.split, second.voice, second.split) == ("en-us", "test", "x", "train")


def test_voice_and_split_are_optional(tmp_path):
    (only,) = read_manifest(manifest(tmp_path, "path\ttext", "a.flac\tGood morning."))
    assert (only.voice, only.split) == ("", "")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["path\tsentence", "a.flac\thello"], r"columns \['text'\] are missing"),
        (["file", "a.flac"], r"\['path', 'text'\] are missing"),
        (["path\ttext", "a.flac\thello", "b.flac\tbye"], r"line 3: no recording at .*b\.flac"),
        (["path\ttext", "a.flac\thello", "a.flac\t  "], "line 3: the text is empty"),
        (["path\ttext", "a.flac"], "line 2: the text is empty"),
        (["path\ttext"], "holds no utterance"),
        (["path\ttext", "a.flac\thello\tworld"], "line 2: 3 fields; the header names 2"),
        (["path\ttext\ttext", "a.flac\thello\tworld"], r"line 1: columns \['text'\] stand twice"),
        (["path\ttext", "", "a.flac\t"], "line 3: the text is empty"),
        (["path\ttext", "x" * 300 + "\thello"], "line 2: no recording"),
    ],
)
def test_manifest_errors_name_the_file_and_the_line(tmp_path, lines, said):
    path = manifest(tmp_path, *lines)
    with pytest.raises(ValueError, match=said) as error:
        read_manifest(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampling_keeps_a_tone(rate):
    got = resample(tone(1, rate), rate, RATE)
    assert got.numel() == RATE
    assert torch.allclose(got[200:-200], tone(1)[200:-200], atol=2e-4)


def test_resampling_removes_what_the_new_rate_cannot_hold():
    assert resample(tone(1, 48_000, 12_000.0), 48_000, RATE)[200:-200].abs().max() < 2e-3


def test_audio_is_mono_float_at_16_khz(tmp_path):
    left, right = tone(0.5, 22_050), torch.zeros(11_025)
    soundfile.write(tmp_path / "stereo.flac", torch.stack([left, right], 1).numpy(), 22_050)
    audio = load_audio(tmp_path / "stereo.flac")
    assert (audio.dtype, audio.shape) == (torch.float32, (8_000,))
    assert torch.allclose(audio[200:-200], tone(0.5)[200:-200] / 2, atol=5e-4)


def test_audio_longer_than_the_context_is_refused(tmp_path):
    soundfile.write(tmp_path / "long.flac", tone(SECONDS + 0.5).numpy(), RATE)
    with pytest.raises(ValueError, match=r"long\.flac: 6\.5 s long"):
        load_audio(tmp_path / "long.flac")


def cut(path, keep):
    path.write_bytes(path.read_bytes()[:keep])


def header_says(path, size):
    """Writes the size of a WAV file's samples as the header names it."""
    data = bytearray(path.read_bytes())
    data[40:44] = struct.pack("<I", size)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "samples", "spoil", "said"),
    [
        ("a.wav", [0.0] * 0, None, "holds no samples"),
        ("a.wav", [0.1, math.nan, 0.1], None, "samples that are not finite"),
        ("a.wav", [0.1, math.inf, 0.1], None, "samples that are not finite"),
        ("a.wav", tone(1), lambda p: cut(p, 20_000), "cut short: the header names 64000 bytes of samples"),
        ("a.aiff", tone(1), lambda p: cut(p, 20_000), "cut short: the header names 64"),
        ("a.au", tone(1), lambda p: cut(p, 20_000), "cut short: the header names 64000 bytes of samples"),
        ("a.flac", tone(1), lambda p: cut(p, 9_000), "not read as audio"),
        ("a.flac", tone(1), lambda p: p.write_bytes(p.read_bytes()[:22] + bytes(4) + p.read_bytes()[26:]), "no length"),
        ("a.wav", tone(1), lambda p: p.write_text("hello"), "not read as audio"),
        ("a.raw", tone(1), lambda p: None, "not read as audio"),
        ("a.wav", tone(1), lambda p: p.unlink(), "not read as audio"),
    ],
)
def test_audio_that_is_not_whole_is_refused_and_named(tmp_path, name, samples, spoil, said):
    path = tmp_path / name
    floats = {} if name == "a.flac" else {"subtype": "FLOAT"}
    soundfile.write(path, torch.as_tensor(samples).numpy(), RATE, format="WAV" if "raw" in name else None, **floats)
    if spoil:
        spoil(path)
    with pytest.raises(ValueError, match=said) as error:
        load_audio(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000, 2 * RATE + 36])
def test_audio_whose_header_knows_no_size_or_counts_itself_is_read(tmp_path, size):
    soundfile.write(tmp_path / "a.wav", tone(1).numpy(), RATE)
    whole = load_audio(tmp_path / "a.wav")
    header_says(tmp_path / "a.wav", size)
    assert torch.equal(load_audio(tmp_path / "a.wav"), whole)


@pytest.mark.filterwarnings("ignore")
def test_an_mp3_file_is_as_long_as_what_is_read(tmp_path):
    """Without the frame that counts the others, its length is an estimate: here 7 s for 5 s."""
    path = tmp_path / "a.mp3"
    try:
        soundfile.write(path, torch.cat([torch.zeros(1_000), tone(4.9)]).numpy(), RATE)
    except (soundfile.SoundFileError, ValueError):
        pytest.skip("libsndfile writes no MP3 here")
    data = path.read_bytes()
    second = next(n for n in range(200, len(data)) if data[n] == data[0] and data[n + 1] == data[1])
    path.write_bytes(data[second:])
    assert soundfile.info(path).duration > SECONDS
    assert 4.9 * RATE < load_audio(path).numel() < 5.2 * RATE


@pytest.mark.parametrize(
    ("start", "stop"),
    [(-0.5, 0.5), (0.5, 0.2), (0.5, 0.5), (5.0, 6.0), (1.5, None), (0.0, 1.1), (0.0, math.nan), (math.nan, 0.5),
     (0.0, math.inf)],
)  # fmt: skip
def test_a_part_beyond_the_file_is_refused(tmp_path, start, stop):
    soundfile.write(tmp_path / "a.wav", tone(1).numpy(), RATE)
    said = rf"a\.wav: start={start}, stop={stop} of 1\.00 s; allowed: 0 <= start < stop <= the length"
    with pytest.raises(ValueError, match=said):
        load_audio(tmp_path / "a.wav", start, stop)
    assert load_audio(tmp_path / "a.wav", 0.5, 1.004).numel() == RATE // 2  # a time is rounded to hundredths


def test_features_are_padded_to_six_seconds(tmp_path):
    mel = features(read_manifest(manifest(tmp_path, "path\ttext", "a.flac\thello", "a.flac\tagain")))
    assert (mel.dtype, mel.shape) == (torch.float32, (2, 80, 100 * SECONDS))
    assert torch.equal(mel[0], mel[1])


class Words:
    """Stands for a tokenizer: the token of the n-th letter is n; a leading space is required and dropped."""

    def encode(self, text, add_special_tokens):
        assert text[0] == " " and add_special_tokens is False
        self.ids = [ord(c) - ord("a") for c in text[1:]]
        return self


def batch_source(tmp_path, size, seed=0, prompt=ENGLISH, texts=("b", "bcd", "ee", "fgf", "h")):
    path = manifest(tmp_path, "path\ttext", *(f"a.flac\t{t}" for t in texts))
    mel = torch.arange(len(texts)).float()[:, None, None].expand(-1, 80, 600)
    return batches(mel, read_manifest(path), Words(), size, seed, prompt), texts


@pytest.mark.parametrize("prompt", [ENGLISH, MULTILINGUAL])
def test_batches_shift_pad_and_end_the_labels(tmp_path, prompt):
    source, texts = batch_source(tmp_path, 5, prompt=prompt)
    head = len(prompt.start)
    mel, inputs, labels = next(source)
    assert mel.shape == (5, 80, 600) and inputs.shape == labels.shape == (5, 3 + head)
    for row in range(5):
        ids = [ord(c) - ord("a") for c in texts[int(mel[row, 0, 0])]]
        rest = 3 - len(ids)
        assert inputs[row].tolist() == [*prompt.start, *ids, *[prompt.end] * rest]
        assert labels[row].tolist() == [*[-100] * (head - 1), *ids, prompt.end, *[-100] * rest]


def test_batches_are_shuffled_by_the_seed_and_visit_everything(tmp_path):
    def order(seed, count=8):
        source, _ = batch_source(tmp_path, 2, seed, texts=tuple("bcdefgji"))
        return [int(v) for _ in range(count) for v in next(source)[0][:, 0, 0]]

    first = order(1)
    assert first == order(1) != order(2)
    assert sorted(first[:8]) == sorted(first[8:]) == list(range(8))
    assert first[:8] != first[8:]


def test_a_set_smaller_than_a_batch_is_one_batch(tmp_path):
    source, texts = batch_source(tmp_path, 8)
    assert len(next(source)[0]) == len(next(source)[0]) == len(texts)


def test_sentences_are_many_distinct_and_plain():
    lines = sentences()
    assert len({line.lower() for line in lines}) == len(lines) >= 660
    for line in lines:
        assert 5 <= len(line.split()) <= 12, line
        assert line == line.strip() and line[-1] in ".?" and line.isascii(), line
        assert not any(c.isdigit() for c in line), line


@pytest.mark.skipif(not SPEECH.is_file(), reason="a source archive has no recordings")
def test_committed_speech_is_what_make_speech_says():
    spoken, lines = read_manifest(SPEECH), sentences()
    counts = Counter((u.voice, u.split) for u in spoken)
    wanted = {(v, s): n for v, (_, train, test) in VOICES.items() for s, n in (("train", train), ("test", test)) if n}
    assert counts == wanted
    assert counts["scottish", "train"] >= 200 and counts["scottish", "test"] == counts["en-us", "test"] == 48
    texts = defaultdict(set)
    for u in spoken:
        texts[u.split].add(u.text)
        assert u.text == lines[int(u.path.stem)] and u.path.parent.name == u.voice
    assert not texts["train"] & texts["test"]
    assert texts["test"] <= set(lines[-TEST_SENTENCES:])
    assert {u.path.resolve() for u in spoken} == {p.resolve() for p in SPEECH.parent.rglob("*.flac")}
    assert sum(u.path.stat().st_size for u in spoken) <= 12e6


@pytest.mark.skipif(not SPEECH.is_file(), reason="a source archive has no recordings")
def test_committed_recordings_fit_the_context():
    for u in read_manifest(SPEECH):
        info = soundfile.info(u.path)
        assert (info.samplerate, info.channels, info.format) == (RATE, 1, "FLAC"), u.path
        assert 0.5 < info.duration < SECONDS, u.path


def test_a_source_archive_without_recordings_says_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr("examples.asr.corpus.SPEECH", tmp_path / "manifest.tsv")
    with pytest.raises(ValueError, match=r"no recordings, as in every source archive; clone the repository"):
        read_manifest(tmp_path / "manifest.tsv")
