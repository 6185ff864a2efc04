"""Any order of what a user may do to a model leaves it computing what the equations say of its state."""

import copy
import io
import pickle
import tempfile

import torch
from helpers import three
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from thorough import examples
from torch import nn

from ssvdo_kernels import (
    SSVDOConfig,
    apply_ssvdo,
    gradient_accumulation,
    load_ssvdo,
    merge_ssvdo,
    reference,
    remove_ssvdo,
    save_ssvdo,
    unmerge_ssvdo,
)
from ssvdo_kernels.adapter import PARAMETER_NAMES
from ssvdo_kernels.host import hosts

NAMES = ("0", "2")  # a tall layer and a wide one


def plain(dtype=torch.float64):
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6)).to(dtype)


class Model(RuleBasedStateMachine):
    """`model` is used; `state` is what it should hold: W0, bias and the adapter's numbers of each layer."""

    @initialize(
        p=st.sampled_from([0.1, 0.5, 1.0]), rank=st.sampled_from([0, 2, 6]), seed=st.integers(0, 10**6),
        rotation=st.sampled_from(["cayley", "neumann", "first_order"]), outer=st.sampled_from(["rotation", "additive"]),
        path=st.sampled_from(["auto", "factored", "folded", "core", "merged"]),
    )  # fmt: skip
    def start(self, p, rank, seed, rotation, outer, path):
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.config = SSVDOConfig(inner_ratio=p, outer_rank=rank, rotation=rotation, outer=outer, path=path,
                                  target_modules=NAMES)  # fmt: skip
        self.dtype, self.tolerance = torch.float64, 1e-9
        self.model = plain()
        self.state = {n: {"weight": self.at(n).weight.detach().clone(), "bias": self.at(n).bias.detach().clone()}
                      for n in NAMES}  # fmt: skip
        self.apply()

    def at(self, name):
        return self.model.get_submodule(name)

    def draw(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def apply(self):
        apply_ssvdo(self.model, self.config)
        self.adapted, self.merged = True, False
        for name in NAMES:
            with torch.no_grad():
                for parameter in self.at(name).adapter.trained:
                    parameter.copy_(0.2 * self.draw(*parameter.shape))
            self.state[name] |= self.numbers(name)

    def numbers(self, name):
        """The adapter's, as the equations take them: of no numbers where the layer has none."""
        return {part: t.detach().clone() for part, t in zip(PARAMETER_NAMES, three(self.at(name)), strict=True)}

    def weight(self, name, parts=None):
        s = self.state[name]
        if not self.adapted:
            return s["weight"]
        parts = [s[part] for part in PARAMETER_NAMES] if parts is None else parts
        return reference.adapted_weight(s["weight"], *parts, self.config)

    def expected(self, x, parts=None):
        for name in NAMES:
            own = None if parts is None else parts[name]
            x = nn.functional.linear(x, self.weight(name, own), self.state[name]["bias"])
            x = torch.tanh(x) if name == "0" else x
        return x

    def close(self, got, want):
        scale = 1 + float(want.detach().abs().max()) if want.numel() else 1.0
        assert float((got - want).detach().abs().max() if want.numel() else 0.0) <= self.tolerance * scale

    @rule(rows=st.sampled_from([0, 1, 7, 40]), grad=st.booleans())
    def forward(self, rows, grad):
        x = self.draw(rows, 6)
        with torch.set_grad_enabled(grad):
            self.close(self.model(x), self.expected(x))

    @rule()
    def infer(self):
        x = self.draw(3, 6)
        with torch.inference_mode():
            got = self.model(x)
        self.close(got.clone(), self.expected(x))

    @precondition(lambda self: self.adapted)
    @rule(rows=st.sampled_from([1, 9]), twice=st.booleans())
    def backward(self, rows, twice):
        self.model.zero_grad()
        parts = {n: [self.state[n][p].clone().requires_grad_() for p in PARAMETER_NAMES] for n in NAMES}
        batches = [(self.draw(rows, 6).requires_grad_(), self.draw(rows, 6)) for _ in range(2 if twice else 1)]
        with gradient_accumulation(self.model):
            for x, cotangent in batches:
                (self.model(x) * cotangent).sum().backward()
        got = [x.grad for x, _ in batches]
        fresh = [x.detach().clone().requires_grad_() for x, _ in batches]
        for x, (_, cotangent) in zip(fresh, batches, strict=True):
            (self.expected(x, parts) * cotangent).sum().backward()
        for mine, x in zip(got, fresh, strict=True):
            self.close(mine, x.grad)
        for name in NAMES:
            for own, theirs in zip(self.at(name).adapter.parts, parts[name], strict=True):
                if own is not None:
                    self.close(own.grad, torch.zeros_like(theirs) if theirs.grad is None else theirs.grad)

    @precondition(lambda self: self.adapted)
    @rule()
    def step(self):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for p in trained:
            p.grad = self.draw(*p.shape)
        torch.optim.SGD(trained, lr=0.05).step()
        self.model.zero_grad()
        self.remember()

    @precondition(lambda self: self.adapted)
    @rule(how=st.sampled_from(["in place", "data", "one number", "exchanged", "assigned", "the same"]))
    def edit(self, how):
        for name in NAMES:
            adapter, numbers = self.at(name).adapter, {}
            for part, p in zip(PARAMETER_NAMES, adapter.parts, strict=True):
                if p is None:
                    continue
                if how == "in place":
                    with torch.no_grad():
                        p.add_(0.1 * self.draw(*p.shape))
                elif how == "data":
                    p.data = p.data + 0.1 * self.draw(*p.shape)
                elif how == "one number":
                    p.data.view(-1)[-1] += 0.1
                elif how == "exchanged":
                    setattr(adapter, part, nn.Parameter(p.detach() + 0.1 * self.draw(*p.shape)))
                elif how == "assigned":
                    numbers[part] = p.detach() + 0.1 * self.draw(*p.shape)
                else:
                    with torch.no_grad():
                        p.mul_(1)
            if numbers:
                adapter.load_state_dict({**adapter.state_dict(), **numbers}, assign=True)
        self.remember()

    def remember(self):
        for name in NAMES:
            self.state[name] |= self.numbers(name)

    @precondition(lambda self: self.adapted)
    @rule(merge=st.booleans())
    def merge(self, merge):
        (merge_ssvdo if merge else unmerge_ssvdo)(self.model)
        self.merged = merge

    @rule(mode=st.booleans())
    def train(self, mode):
        self.model.train(mode)

    @rule(how=st.sampled_from(["deepcopy", "pickle", "torch"]))
    def copy(self, how):
        if how == "deepcopy":
            self.model = copy.deepcopy(self.model)
        elif how == "pickle":
            self.model = pickle.loads(pickle.dumps(self.model))
        else:
            file = io.BytesIO()
            torch.save(self.model, file)
            file.seek(0)
            self.model = torch.load(file, weights_only=False)

    @precondition(lambda self: self.adapted)
    @rule()
    def state_dict(self):
        fresh = plain(self.dtype)
        with torch.no_grad():
            for name in NAMES:
                fresh.get_submodule(name).weight.copy_(self.state[name]["weight"])
        apply_ssvdo(fresh, self.config).load_state_dict(self.model.state_dict())
        self.model, self.merged = fresh, False

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def move(self, dtype):
        self.model.to(dtype)
        self.dtype = dtype
        for s in self.state.values():
            for part in s:
                s[part] = s[part].to(dtype)
        if dtype == torch.float32:
            self.tolerance = 2e-4  # W' from factors rounded to float32, through products with 1/S of small weights

    @precondition(lambda self: self.adapted)
    @rule(own=st.booleans(), fresh=st.booleans())
    def save_and_load(self, own, fresh):
        own = own or self.tolerance > 1e-6  # bases of rounded weights may come out otherwise, as load_ssvdo would say
        with tempfile.TemporaryDirectory() as folder:
            save_ssvdo(self.model, folder, include_basis=own)
            if not fresh:
                self.step()
                wanted = load_ssvdo(self.model, folder)
            else:
                wanted = plain(self.dtype)
                with torch.no_grad():
                    for name in NAMES:
                        wanted.get_submodule(name).weight.copy_(self.state[name]["weight"])
                        wanted.get_submodule(name).bias.copy_(self.state[name]["bias"])
                load_ssvdo(wanted, folder)
                self.merged = False
        self.model = wanted
        self.remember()

    @precondition(lambda self: self.adapted)
    @rule(merge=st.booleans(), again=st.booleans())
    def remove(self, merge, again):
        if merge:
            for name in NAMES:
                self.state[name]["weight"] = self.weight(name).detach().to(self.dtype)
        remove_ssvdo(self.model, merge=merge)
        self.adapted = self.merged = False
        for name in NAMES:
            self.close(self.at(name).weight, self.state[name]["weight"])
            self.state[name]["weight"] = self.at(name).weight.detach().clone()
        if again:
            self.apply()

    @precondition(lambda self: not self.adapted)
    @rule()
    def apply_again(self):
        self.apply()

    @invariant()
    def the_base_is_untouched(self):
        if hasattr(self, "model"):
            for name in NAMES:
                assert torch.equal(self.at(name).weight, self.state[name]["weight"])
                assert torch.equal(self.at(name).bias, self.state[name]["bias"])
            assert all(layer.merged == self.merged for _, layer in hosts(self.model))


TestModel = Model.TestCase
TestModel.settings = examples(300, 10_000)
