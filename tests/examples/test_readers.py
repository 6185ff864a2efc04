"""Corpora of other tools."""

import itertools
import json

import pytest

for needed in ("transformers", "tokenizers", "soundfile"):
    pytest.importorskip(needed, reason="the speech example needs the extra: pip install 'ssvdo_kernels[asr]'")

import soundfile
import torch

from examples.asr.corpus import RATE, load_audio, read_manifest
from examples.asr.readers import open_corpus, read_audio_folder, read_corpus, read_kaldi


def folder_of(root, files, audio=("a.wav",)):
    root.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
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


def test_minus_one_is_the_end_of_the_file(tmp_path):
    folder = folder_of(tmp_path / "d", {"wav.scp": "r a.wav\n", "text": "u hi\n", "segments": "u r 0.25 -1\n"})
    (only,) = read_kaldi(folder)
    assert load_audio(only.path, only.start, only.stop).numel() == 3 * RATE // 4


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
        ({"wav.scp": "u a.wav\nu a.wav\n", "text": "u hi\n"}, r"wav\.scp, line 2: 'u' stands on line 1 already"),
        ({"wav.scp": "u a.wav\n", "text": "u hi\nu ho\n"}, "text, line 2: 'u' stands on line 1 already"),
        ({"wav.scp": "r a.wav\n", "text": "u hi\n", "segments": "u r 0 1\nv r 0 1\nu r 0 1\n"},
         "segments, line 3: 'u' stands on line 1 already"),
        *(({"wav.scp": "r a.wav\n", "text": "u hi\n", "segments": f"u r {times}\n"},
           f"segments, line 1: start and stop are {times}; allowed: 0 <= start < stop, or -1")
          for times in ("-0.5 0.5", "0.5 0.2", "0.5 0.5", "0 nan", "nan 1", "0 inf", "0 -2", "-1 -1", "inf -1")),
    ],
)  # fmt: skip
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
        ("metadata.jsonl", "[" * 100_000, "line 1: no JSON object"),
        ("metadata.jsonl", '{"text": "a", "text": "b", "file_name": "a.wav"}', "line 1: no JSON object .'text' stands"),
        ("metadata.csv", "file_name,text\na.wav,hello, world\n", "line 2: 3 fields; the header names 2"),
        ("metadata.csv", "file_name,text,text\na.wav,a,b\n", r"line 1: columns \['text'\] stand twice"),
        ("metadata.csv", 'file_name,text\na.wav,"hello\na.wav,world\n', "line 2: unexpected end of data"),
        ("metadata.csv", 'file_name,text\na.wav,"hello" world\n', "line 2: ',' expected after"),
        ("metadata.csv", 'file_name,text\n\n\nb.wav,world\n', "line 4: no recording"),
        ("other.csv", "", "holds no utterance"),
    ],
)
def test_audio_folder_errors(tmp_path, name, text, said):
    with pytest.raises(ValueError, match=said):
        read_audio_folder(folder_of(tmp_path / "d", {name: text}))


@pytest.mark.parametrize("names", [*itertools.combinations(("manifest.tsv", "metadata.csv", "metadata.jsonl"), 2)])
def test_two_lists_of_recordings_are_refused(tmp_path, names):
    rows = {"manifest.tsv": "path\ttext\na.wav\thi\n", "metadata.csv": "file_name,text\na.wav,hi\n",
            "metadata.jsonl": '{"file_name": "a.wav", "text": "hi"}\n'}  # fmt: skip
    folder = folder_of(tmp_path / "d", {name: rows[name] for name in names})
    with pytest.raises(ValueError, match=f"holds {names[0]} and {names[1]}; one list of recordings is allowed"):
        read_corpus(folder)
    folder.rename(tmp_path / "train")
    if "manifest.tsv" not in names:
        with pytest.raises(ValueError, match=f"train: holds {names[0]} and {names[1]}"):
            read_audio_folder(tmp_path)


@pytest.mark.parametrize("text", ["two words", "a\u2028b", "a\x85b", "a\x0bb\x1cc", "one  two", "\u4f60\u3000\u597d"])
@pytest.mark.parametrize("kind", ["kaldi", "kaldi tabs", "jsonl", "csv", "tsv"])
def test_a_text_is_read_as_it_is_written(tmp_path, kind, text):
    """Newlines alone end lines; blanks at the end and byte order marks are nothing; space or tab ends Kaldi's names."""
    row = json.dumps({"file_name": "a.wav", "text": text}, ensure_ascii=False)
    files = {"jsonl": {"metadata.jsonl": row}, "csv": {"metadata.csv": f"file_name,text\na.wav,{text}"},
             "tsv": {"manifest.tsv": f"path\ttext\na.wav\t{text}"},
             "kaldi": {"wav.scp": "u1 a.wav", "text": f"u1 {text}"},
             "kaldi tabs": {"wav.scp": "u1\ta.wav", "text": f"u1\t{text}"}}[kind]  # fmt: skip
    folder = folder_of(tmp_path / "d", files)
    for mark, end in itertools.product(("", "\ufeff"), ("", "\n", "\r\n", "\n\n", "\r\n\r\n")):
        for name, content in files.items():
            lines = content.replace("\n", "\r\n") if "\r" in end else content
            (folder / name).write_bytes((mark + lines + end).encode())
        assert [u.text for u in read_corpus(folder)] == [text], (mark, end)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"wav.scp": "u1 a.wav\n", "text": "u1 caf\xe9\n".encode("latin-1")}, "text: not UTF-8"),
        ({"metadata.csv": "file_name,text\na.wav,hi\n".encode("utf-16")}, r"metadata\.csv: not UTF-8"),
        ({"metadata.csv": "file_name,text\na.wav," + "x" * 200_000}, r"metadata\.csv, line 2: field larger"),
        ({"metadata.csv": 'file_name,text\na.wav,"two\nlines"\nb.wav,hi\n'}, r"metadata\.csv, line 4: no recording"),
        ({"metadata.csv": 'file_name,text\nb.wav,"two\nlines"\n'}, r"metadata\.csv, line 2: no recording"),
        ({"metadata.jsonl": '{"file_name": "a.wav", "text": 5}\n'}, r"metadata\.jsonl, line 1: needs file_name"),
        ({"wav.scp": "u1 a.wav\n\nu2 a.wav\n", "text": "u1 hi\n"}, r"wav\.scp, line 2: expected a name"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, files, said):
    with pytest.raises(ValueError, match=said):
        read_corpus(folder_of(tmp_path / "d", files))


def test_a_corpus_is_put_together_by_voice_and_split(tmp_path):
    kaldi = folder_of(tmp_path / "k", {"wav.scp": "u a.wav\n", "text": "u hello\n"})
    tsv = folder_of(tmp_path / "t", {"m.tsv": "path\ttext\tsplit\na.wav\tbye\ttest\n"}) / "m.tsv"
    corpus = open_corpus(f"mine/train={kaldi},mine={tsv}")
    assert [u.text for u in corpus.of("mine", "train")] == ["hello"]
    assert [u.text for u in corpus.of("mine", "test")] == ["bye"]
    with pytest.raises(ValueError, match=r"voice 'mine' has no utterance of split 'dev'; the corpus has .*'train'"):
        corpus.of("mine", "dev")


def test_real_speech_is_found_where_it_is_said_to_be(tmp_path, monkeypatch):
    monkeypatch.setenv("SSVDO_SPEECH", str(tmp_path))
    with pytest.raises(ValueError, match=rf"no {tmp_path}/speechocean762/manifest.tsv; set SSVDO_SPEECH, or make it"):
        open_corpus("speech")
    for name, voice in (("speechocean762", "child"), ("librispeech_other", "librispeech")):
        folder_of(tmp_path / name, {"manifest.tsv": f"path\ttext\tvoice\tsplit\na.wav\thi there\t{voice}\ttest\n"})
    assert [u.voice for u in open_corpus("speech").utterances] == ["child", "librispeech"]


def test_unknown_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"corpus='nonsense': expected 'committed'"):
        open_corpus("nonsense")
    with pytest.raises(ValueError, match="no such file or folder"):
        read_corpus(tmp_path / "missing")
    with pytest.raises(ValueError, match="not read as text"):
        read_manifest(tmp_path)
    assert len(open_corpus("committed").of("scottish", "train")) == 200
