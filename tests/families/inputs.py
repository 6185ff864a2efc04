"""Inputs of the tiny models, as functions of the model."""

import inspect

import torch

from .shrink import VOCABULARY

PLACEHOLDER = 90  # the token that stands for a row of another tower, where a family's own number would not do


def draw(*shape):
    """Random numbers."""
    return torch.randn(*shape)


def ids(config, length=12, batch=2):
    """Random tokens of the model's vocabulary."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None) or getattr(config, "vocab_size", None) or 50
    return torch.randint(3, min(size, VOCABULARY) - 1, (batch, length))


def codes(batch, *shape):
    """Random codes of an audio codec."""
    return torch.randint(3, 60, (batch, *shape))


def wave(length, batch=1):
    """`input_values`: mono audio."""
    return lambda model: {"input_values": draw(batch, 1, length)}


def mel(batch, length, bins):
    """`input_features`: a spectrogram."""
    return lambda model: {"input_features": draw(batch, length, bins)}


def masked_mel(bins, length, mask="input_features_mask"):
    """A spectrogram with its mask, bins first."""
    return lambda model: {"input_features": draw(1, bins, length), mask: torch.ones(1, length, dtype=torch.bool)}


def text(model):
    """Tokens alone."""
    return {"input_ids": ids(model.config), "use_cache": False}


def text_and_image(model):
    """Tokens and an image of a model that compares the two."""
    return {"input_ids": ids(model.config.text_config), "pixel_values": draw(2, 3, 32, 32)}


def video(model):
    """Four images."""
    return {"pixel_values": draw(2, 4, 3, 32, 32)}


def with_placeholders(features, getter="get_audio_features", token="audio_token_id"):
    """Tokens with as many placeholders among them as the tower `getter` makes rows of `features`."""

    def inputs(model):
        given = features(model)
        with torch.no_grad():
            rows = getattr(model, getter)(**given)
        rows = getattr(rows, "pooler_output", rows)
        rows = rows if isinstance(rows, (list, tuple)) else [rows]
        count = sum(row.reshape(-1, row.shape[-1]).shape[0] for row in rows)
        return {**around(getattr(model.config, token), count), **given, "use_cache": False}

    return inputs


def around(token, count):
    """A line of tokens, `count` times `token` in its middle."""
    others = [other for other in range(3, PLACEHOLDER) if other != token]
    return {"input_ids": torch.tensor([others[:3] + [token] * count + others[5:12]])}


def _image(config):
    size = getattr(config, "image_size", 32)
    sides = size if isinstance(size, (tuple, list)) else (size, size)
    return draw(2, getattr(config, "num_channels", 3), *sides)


def _bins(config):
    """The width of the spectrogram that a configuration, or one in it, asks for."""
    names = ("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim")
    within = (config, getattr(config, "encoder_config", None), getattr(config, "audio_config", None))
    found = (getattr(one, name, None) for one in within for name in names)
    return next((bins for bins in found if isinstance(bins, int)), 80)


def by_signature(model):
    """What the model's main input, and its forward's arguments, tell."""
    config, main = model.config, model.main_input_name
    arguments = inspect.signature(model.forward).parameters
    found = {}
    if main == "pixel_values":
        found["pixel_values"] = _image(getattr(config, "vision_config", config))
    elif main == "input_values":
        found["input_values"] = draw(2, 2000)
    elif main == "input_features":
        found["input_features"] = draw(2, 64, _bins(config))
    elif "input_ids" in arguments:
        found["input_ids"] = ids(config)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in arguments:
        found["decoder_input_ids"] = ids(config, 7)
    if "use_cache" in arguments:
        found["use_cache"] = False
    return found
