"""What a family's tiny model needs beyond the rules."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .inputs import by_signature
from .shrink import EXPERT, FEED_FORWARD, HIDDEN, SHARED_EXPERT

WIDTHS = frozenset(factor * size for size in (FEED_FORWARD, EXPERT, SHARED_EXPERT) for factor in (1, 2)) | {4 * HIDDEN}


@dataclass(frozen=True)
class Family:
    """One family's tiny model: what departs from the rules.

    Args:
        config: values of the configuration, by name. kind: the class of the configuration, where no model type tells.
        cls: the name of the model's class, where no task tells. build: makes the model, in place of all these.
        inputs: the inputs of the model. widths: sides of its feed-forward layers, for those that no other layer has.
        feed_forward: names (a regular expression) of feed-forward layers, for widths that other layers have too.
        missed: why some feed-forward layers are not adapted by default; "" where all are.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    kind: str = ""
    cls: str = ""
    build: Callable[[], Any] | None = None
    inputs: Callable[[Any], dict[str, Any]] = by_signature
    widths: frozenset[int] = WIDTHS
    feed_forward: str = ""
    missed: str = ""
