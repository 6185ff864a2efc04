"""Corpora of other tools."""

import json

import pytest

for needed in ("transformers", "tokenizers", "soundfile"):
    pytest.importorskip(needed, reason="the speech example needs the extra: pip install 'ssvdo_kernels[asr]'")

import soundfile
import torch

from examples.asr.corpus import RATE, load_audio
from examples.asr.readers import open_corpus, read_audio_folder, read_corpus, read_kaldi


def folder_of(root, files, audio=("a.wav",)):
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)
    for name in audio:
        (root / name).parent.mkdir(exist_ok=True)
        soundfile.write(root / name, torch.linspace(-0.5, 0.5, RATE).numpy(), RATE)
    return root


def test_kaldi_folder(tmp_path):
    folder = folder_of(tmp_path / "train", {"wav.scp": "u1 a.wav\nu2 b.wav\n", "text": "u2 two words\nu1  one\n"},
                       ("a.wav", "b.wav"))  # fmt: skip
    found = read_kaldi(folder)
    assert [(u.path.name, u.text) for u in found] == [("b.wav", "two words"), ("a.wav", "one")]
    assert {u.voice for u in found} == {"train"}


def test_kaldi_segments_are_cut_out(tmp_path):
    folder = folder_of(tmp_path / "d", {"wav.scp": "r a.wav\n", "text": "s1 one\ns2 two\n",
                                        "segments": "s1 r 0.0 0.25\ns2 r 0.5 1.0\n"})  # fmt: skip
    first, second = read_kaldi(folder)
    whole = load_audio(folder / "a.wav")
    assert torch.equal(load_audio(first.path, first.start, first.stop), whole[:4000])
    assert torch.equal(load_audio(second.path, second.start, second.stop), whole[8000:])


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"wav.scp": "u a.wav\n"}, "no text"),
        ({"wav.scp": "u a.wav\n", "text": "v hello\n"}, "text, line 1: utterance 'v' has no recording"),
        ({"wav.scp": "u a.wav\n", "text": "u\n"}, "text, line 1: expected a name and a value"),
        ({"wav.scp": "u b.wav\n", "text": "u hello\n"}, r"wav.scp, line 1: no recording at .*b\.wav"),
        ({"wav.scp": "u rm -rf x |\n", "text": "u hello\n"}, "line 1: a command, which is not run"),
        ({"wav.scp": "r a.wav\n", "text": "u hi\n", "segments": "u r 0 x\n"}, "segments, line 1: expected"),
        ({"wav.scp": "r a.wav\n", "text": "u hi\n", "segments": "u q 0 1\n"}, "'u' has no recording"),
        ({"wav.scp": "u a.wav\n", "text": ""}, "holds no utterance"),
    ],
)
def test_kaldi_errors_name_the_line(tmp_path, files, said):
    with pytest.raises(ValueError, match=said):
        read_kaldi(folder_of(tmp_path / "d", files))


def test_audio_folder_with_splits(tmp_path):
    rows = "\n".join(json.dumps({"file_name": "a.wav", "sentence": "hi there"}) for _ in range(2))
    files = {"train/metadata.csv": "file_name,transcription\na.wav,hello\n", "validation/metadata.jsonl": rows}
    folder = folder_of(tmp_path / "hf", files, ("train/a.wav", "validation/a.wav"))
    assert [(u.text, u.split) for u in read_audio_folder(folder)] == [
        ("hello", "train"), ("hi there", "dev"), ("hi there", "dev")]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("metadata.csv", "file_name,text\na.wav,\n", "line 2: needs file_name and text"),
        ("metadata.csv", "file_name,text\nb.wav,hi\n", "line 2: no recording"),
        ("metadata.jsonl", "[1]\n", "line 1: no JSON object"),
        ("metadata.jsonl", "{", "line 1: no JSON object"),
        ("other.csv", "", "holds no utterance"),
    ],
)
def test_audio_folder_errors(tmp_path, name, text, said):
    with pytest.raises(ValueError, match=said):
        read_audio_folder(folder_of(tmp_path / "d", {name: text}))


def test_a_corpus_is_put_together_by_voice_and_split(tmp_path):
    kaldi = folder_of(tmp_path / "k", {"wav.scp": "u a.wav\n", "text": "u hello\n"})
    tsv = folder_of(tmp_path / "t", {"m.tsv": "path\ttext\tsplit\na.wav\tbye\ttest\n"}) / "m.tsv"
    corpus = open_corpus(f"mine/train={kaldi},mine={tsv}")
    assert [u.text for u in corpus.of("mine", "train")] == ["hello"]
    assert [u.text for u in corpus.of("mine", "test")] == ["bye"]
    with pytest.raises(ValueError, match=r"voice 'mine' has no utterance of split 'dev'; the corpus has .*'train'"):
        corpus.of("mine", "dev")


def test_unknown_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"corpus='nonsense': expected 'committed'"):
        open_corpus("nonsense")
    with pytest.raises(ValueError, match="no such file or folder"):
        read_corpus(tmp_path / "missing")
    assert len(open_corpus("committed").of("scottish", "train")) == 200
