"""Every family of Transformers: which layers are adapted by default, and that adapters work on them, natively and in
PEFT. The suite runs a few families of different kinds; `nox -s families` runs all."""

import pytest

pytest.importorskip("transformers", minversion="5.0", reason="the builders are for the families of Transformers 5")
peft = pytest.importorskip("peft")

from ssvdo_kernels import SSVDOConfig
from ssvdo_kernels.targets import find_targets

from . import check, truth
from .models import FAMILIES, TooOld, inputs_of, make

OLD_PEFT = tuple(map(int, peft.__version__.split(".")[:2])) < (0, 21)
IN_SUITE = ("whisper", "wav2vec2", "parakeet_ctc", "moshi", "vits", "xcodec", "gpt2", "falcon", "t5", "mixtral",
            "gpt_oss", "qwen2_moe", "phi3", "convnext")  # fmt: skip
pytestmark = [pytest.mark.families, pytest.mark.filterwarnings("ignore")]


class Subject:
    """A family's tiny model, its feed-forward layers and what a test of it needs; made when first asked for."""

    def __init__(self, name):
        self.name, self.family, self._ready = name, FAMILIES[name], None
        try:
            self.model = make(name)
        except (TooOld, ImportError) as error:
            pytest.skip(" ".join(str(error).split()))
        self.expected = truth.feed_forward(name, self.model)

    def through(self, way, targets, **options):
        if self._ready is None:
            inputs = inputs_of(self.name, self.model)
            self._ready = inputs, check.base_gradients(self.model, inputs)
        inputs, base = self._ready
        return way(self.model, inputs, targets, base, **options)

    def where_lora_works(self, way, targets):
        """Adapts; skips where this fails, and PEFT's LoRA fails too on the same layers."""
        try:
            return self.through(way, targets)
        except Exception as error:
            if OLD_PEFT and "needs PEFT 0.21" in str(error):
                pytest.skip(str(error))
            try:
                self.through(check.through_peft, targets or sorted(self.expected), lora=True)
            except Exception as theirs:
                pytest.skip(f"LoRA fails too: {' '.join(str(theirs).split())[:200]}")
            raise error


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.quick) if n in IN_SUITE else n
                                        for n in FAMILIES])  # fmt: skip
def subject(request):
    return Subject(request.param)


def test_the_default_names_are_the_feed_forward_layers(subject):
    try:
        found = find_targets(subject.model, SSVDOConfig(outer_rank=2))
    except (ValueError, TypeError):  # nothing found
        found = {}
    names = {(name.rpartition(".")[0] if site.part else name).removesuffix(".weight") for name, site in found.items()}
    assert truth.without_numbers(names - subject.expected) == []
    missed = truth.without_numbers(subject.expected - names)
    assert bool(missed) == bool(subject.family.missed), missed


def holds_some(subject):
    if not subject.expected or subject.family.missed:
        pytest.skip(subject.family.missed or "no feed-forward layers")


def test_apply_ssvdo_by_default_names(subject):
    holds_some(subject)
    assert subject.through(check.through_core, None) == subject.expected


def test_apply_ssvdo_to_all_linear(subject):
    assert subject.where_lora_works(check.through_core, "all-linear")


def test_peft_by_default_names(subject):
    holds_some(subject)
    assert subject.where_lora_works(check.through_peft, None) == subject.expected


def test_peft_to_all_linear(subject):
    assert subject.where_lora_works(check.through_peft, "all-linear")
