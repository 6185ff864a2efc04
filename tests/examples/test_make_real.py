"""The real recordings: the list of utterances, and folders made from the two public corpora as they are unpacked."""

from collections import Counter
from pathlib import Path

import pytest
import torch

for needed in ("transformers", "tokenizers", "soundfile"):
    pytest.importorskip(needed, reason="the speech example needs the extra: pip install 'ssvdo_kernels[asr]'")

import soundfile

from examples.asr import demo_speech, make_real
from examples.asr.corpus import RATE, load_audio
from examples.asr.make_real import Row, listed, main
from examples.asr.readers import open_corpus, real_folder

ROWS = [Row("000530060", "child", "dev"), Row("000560017", "adult", "test"),
        Row("1688-142285-0002", "librispeech", "test")]  # fmt: skip


def corpora(folder):
    """The layout of the two corpora, with a recording or two."""
    audio = torch.linspace(-0.3, 0.6, RATE)
    said = (("train", "000530060", "SIR THREE"), ("test", "000560017", "IT'S HOT"), ("test", "000560018", "SO HOT"))
    for part, name, text in said:
        where, listed = folder / "speechocean762" / "WAVE" / f"SPEAKER{name[1:5]}", folder / "speechocean762" / part
        where.mkdir(parents=True, exist_ok=True)
        soundfile.write(where / f"{name}.WAV", audio.numpy(), RATE, subtype="PCM_16")
        listed.mkdir(exist_ok=True)
        with (listed / "wav.scp").open("a") as scp, (listed / "text").open("a") as texts:
            scp.write(f"{name}\tWAVE/SPEAKER{name[1:5]}/{name}.WAV\n")
            texts.write(f"{name}\t{text}\n")
    chapter = folder / "LibriSpeech" / "test-other" / "1688" / "142285"
    chapter.mkdir(parents=True)
    soundfile.write(chapter / "1688-142285-0002.flac", audio.numpy(), RATE)
    (chapter / "1688-142285.trans.txt").write_text("1688-142285-0002 YOU DON'T MEAN IT\n")
    return ["--speechocean762", str(folder / "speechocean762"), "--librispeech", str(folder / "LibriSpeech")]


def test_folders_are_made_and_read(tmp_path, monkeypatch):
    monkeypatch.setattr(make_real, "listed", lambda: ROWS)
    monkeypatch.setenv("SSVDO_SPEECH", str(tmp_path / "out"))
    assert main(corpora(tmp_path)) == 0
    found = open_corpus("speech").utterances
    assert [(u.text, u.voice, u.split, u.speaker) for u in found] == [
        ("sir three", "child", "dev", "0053"), ("it's hot", "adult", "test", "0056"),
        ("you don't mean it", "librispeech", "test", "1688")]  # fmt: skip
    child, _, libri = (load_audio(u.path) for u in found)
    assert child.abs().max() == pytest.approx(0.95, abs=1 / 2048) and torch.equal(child * 1024, (child * 1024).round())
    assert libri.abs().max() == pytest.approx(0.6, abs=1e-4)


def test_the_demo_takes_children_from_either_folder(tmp_path, monkeypatch):
    rows = [Row("000530060", "child", "train"), Row("000560017", "child", "test"), Row("000560018", "adult", "test")]
    for module in (make_real, demo_speech):
        monkeypatch.setattr(module, "listed", lambda: [*rows, ROWS[2]])
    options = [*corpora(tmp_path), "--out", str(tmp_path / "out")]
    assert main(options) == 0

    def texts(speech):
        return [[u.text for u in part] for part in (speech.train, speech.test, speech.kept)]

    unpacked, made = (demo_speech.children(tmp_path / folder) for folder in ("speechocean762", "out"))
    assert (texts(unpacked), unpacked.source) == ([["sir three"], ["it's hot"], ["so hot"]], "adults")
    assert texts(made) == [["sir three"], ["it's hot"], ["you don't mean it"]]
    with pytest.raises(ValueError, match=r"no train/wav\.scp"):
        demo_speech.children(tmp_path)
    rows[1:] = []
    with pytest.raises(ValueError, match=r"speechocean762: no utterance of children or adults to test on"):
        demo_speech.children(tmp_path / "speechocean762")


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(make_real, "listed", lambda: [*ROWS, Row("000539999", "child", "test")])
    options = [*corpora(tmp_path), "--out", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="1 of 3 utterances are not in the corpus, '000539999' the first"):
        main(options)
    (tmp_path / "speechocean762" / "test" / "text").unlink()
    with pytest.raises(ValueError, match="no test/text; allowed: the corpus, unpacked"):
        main(options)
    with pytest.raises(ValueError, match=r"no \*\.trans\.txt below it"):
        make_real.librispeech(tmp_path / "out")


def test_the_list_keeps_speakers_apart():
    rows = listed()
    assert Counter((r.voice, r.split) for r in rows) == {
        ("child", "train"): 336, ("child", "dev"): 60, ("child", "test"): 192, ("adult", "train"): 363,
        ("adult", "dev"): 55, ("adult", "test"): 183, ("librispeech", "test"): 78}  # fmt: skip
    for voice in ("child", "adult"):
        by_split = [{r.speaker for r in rows if (r.voice, r.split) == (voice, s)} for s in ("train", "dev", "test")]
        assert not by_split[0] & by_split[1] and not by_split[2] & (by_split[0] | by_split[1])
        tests = [r.speaker for r in rows if (r.voice, r.split) == (voice, "test")]
        assert len(set(tests[:60])) == 60  # rows alternate, so that the first N have as many speakers as they can
    assert len({r.id for r in rows}) == len(rows)


def test_the_recordings_at_hand_are_those_of_the_list(monkeypatch):
    folder = next((p for p in (real_folder(), Path(__file__).parents[3] / "shared" / "speech") if p.is_dir()), None)
    if folder is None:
        pytest.skip("the real recordings are not here; python -m examples.asr.make_real makes them")
    monkeypatch.setenv("SSVDO_SPEECH", str(folder))
    found = open_corpus("speech").utterances
    assert [(u.path.stem, u.voice, u.split, u.speaker) for u in found] == [
        (r.id, r.voice, r.split, r.speaker) for r in listed()]
    for voice in ("child", "adult"):
        said = {s: {u.text for u in found if (u.voice, u.split) == (voice, s)} for s in ("train", "dev", "test")}
        assert not said["test"] & (said["train"] | said["dev"])
    assert all(len(u.text.split()) > 1 and not any(map(str.isdigit, u.text)) for u in found)
