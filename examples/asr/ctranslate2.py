"""CTranslate2's model file, read as data, and Whisper's weights under transformers' names."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

_DTYPES = {0: torch.float32, 1: torch.int8, 2: torch.int16, 3: torch.int32, 4: torch.float16}


class WeightsError(RuntimeError):
    """The weights cannot be had, or are not what they should be."""


def read_ctranslate2(data: bytes) -> dict[str, Tensor]:
    """Variables of a CTranslate2 model.bin: name -> tensor.

    Layout, little-endian: u32 version, str spec, u32 revision, u32 count; per variable str name, u8 rank, u32 dims,
    u8 dtype (0 f32, 1 i8, 2 i16, 3 i32, 4 f16), u32 bytes, data; u32 aliases, pairs of str. str: u16 length, text, NUL.

    Raises:
        WeightsError: the data is truncated or malformed.
    """
    offset = 0

    def take(size: int) -> bytes:
        nonlocal offset
        if offset + size > len(data):
            raise WeightsError(f"model.bin is truncated: {size} bytes wanted at {offset} of {len(data)}")
        offset += size
        return data[offset - size : offset]

    def number(code: str) -> int:
        return int(struct.unpack("<" + code, take(struct.calcsize(code)))[0])

    def text() -> str:
        return take(number("H")).rstrip(b"\0").decode("utf-8", "replace")

    number("I"), text(), number("I")
    variables: dict[str, Tensor] = {}
    for _ in range(number("I")):
        name = text()
        dims = [number("I") for _ in range(number("B"))]
        code, size = number("B"), number("I")
        dtype, count = _DTYPES.get(code), 1
        for d in dims:
            count *= d
        if dtype is None or size != count * dtype.itemsize:
            raise WeightsError(f"model.bin: variable {name!r} of shape {dims}, dtype code {code} has {size} bytes")
        variables[name] = torch.frombuffer(bytearray(take(size)), dtype=dtype).view(dims)
    return variables


def to_transformers(variables: dict[str, Tensor]) -> dict[str, Tensor]:
    """CTranslate2's Whisper variables under transformers' names, float32. q, k, v are split; k has no bias."""
    state: dict[str, Tensor] = {}

    def put(prefix: str, source: str) -> None:
        for ours, theirs in (("weight", "weight"), ("bias", "bias"), ("weight", "gamma"), ("bias", "beta")):
            if f"{source}/{theirs}" in variables:
                state[f"{prefix}.{ours}"] = variables[f"{source}/{theirs}"].float()

    def split(prefix: str, source: str, names: list[str]) -> None:
        for name, weight, bias in zip(names, variables[f"{source}/weight"].chunk(len(names)),
                                      variables[f"{source}/bias"].chunk(len(names)), strict=True):
            state[f"{prefix}.{name}.weight"] = weight.float().clone()
            if name != "k_proj":
                state[f"{prefix}.{name}.bias"] = bias.float().clone()

    for side in ("encoder", "decoder"):
        base = f"model.{side}"
        state[f"{base}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"].float()
        put(f"{base}.layer_norm", f"{side}/layer_norm")
        layer = 0
        while f"{side}/layer_{layer}/ffn/linear_0/weight" in variables:
            ours, theirs = f"{base}.layers.{layer}", f"{side}/layer_{layer}"
            split(f"{ours}.self_attn", f"{theirs}/self_attention/linear_0", ["q_proj", "k_proj", "v_proj"])
            put(f"{ours}.self_attn.out_proj", f"{theirs}/self_attention/linear_1")
            put(f"{ours}.self_attn_layer_norm", f"{theirs}/self_attention/layer_norm")
            if side == "decoder":
                put(f"{ours}.encoder_attn.q_proj", f"{theirs}/attention/linear_0")
                split(f"{ours}.encoder_attn", f"{theirs}/attention/linear_1", ["k_proj", "v_proj"])
                put(f"{ours}.encoder_attn.out_proj", f"{theirs}/attention/linear_2")
                put(f"{ours}.encoder_attn_layer_norm", f"{theirs}/attention/layer_norm")
            put(f"{ours}.fc1", f"{theirs}/ffn/linear_0")
            put(f"{ours}.fc2", f"{theirs}/ffn/linear_1")
            put(f"{ours}.final_layer_norm", f"{theirs}/ffn/layer_norm")
            layer += 1
    put("model.encoder.conv1", "encoder/conv1")
    put("model.encoder.conv2", "encoder/conv2")
    put("model.decoder.embed_tokens", "decoder/embeddings")
    state["proj_out.weight"] = state["model.decoder.embed_tokens.weight"]
    return state
