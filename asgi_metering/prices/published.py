"""
Published prices of models, in USD: the data that the package ``genai-prices`` carries.

The one place that knows that package. Reads its data as it was installed, and converts it to prices of our own; never
its functions that charge, nor its updater, which would fetch newer data from the network: a snapshot that an
application fetched itself changes nothing here either.
"""

from __future__ import annotations

import importlib.metadata
import threading
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from asgi_metering.errors import MissingExtraError
from asgi_metering.prices.costing import CITATIONS
from asgi_metering.prices.tokens import TokenPrice, TokenTier
from asgi_metering.prices.units import SECONDS, UnitPrice

if TYPE_CHECKING:
    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import ModelPrice

__all__ = ["PublishedModel", "Rate", "find_published", "load_published", "published_version"]


class Rate(NamedTuple):
    """
    What a model costs, in USD.

    Attributes:
        tokens: By its tokens; None where it has no such price.
        units: By what else is reported.
        call: For each call.
        is_media: It answers with images, whose tokens have a price of their own and cannot be counted by their text.
    """

    tokens: TokenPrice | None = None
    units: UnitPrice | None = None
    call: Decimal = Decimal(0)
    is_media: bool = False


TOKENS: Final = {
    "input_mtok": "input",
    "output_mtok": "output",
    "cache_read_mtok": "cached",
    "cache_write_mtok": "cache_write",
    "cache_write_1h_mtok": "cache_write_1h",
    "output_reasoning_mtok": "reasoning",
    "input_audio_mtok": "audio_input",
    "output_audio_mtok": "audio_output",
    # Of both, the price of images.
    "input_video_mtok": "image_input",
    "input_image_mtok": "image_input",
    "output_video_mtok": "image_output",
    "output_image_mtok": "image_output",
}
"""Their names of prices for a million tokens, and ours."""

UNITS: Final = {
    "web_searches_kcount": ("web_searches", 1_000),
    "output_citation_mtok": (CITATIONS, 1_000_000),
    "storage_searches_kcount": ("storage_searches", 1_000),
    "audio_hours": (SECONDS, 3_600),
    "input_audio_hours": (SECONDS, 3_600),
    "input_mchars": ("characters", 1_000_000),
    "input_document_kpages": ("pages", 1_000),
}
"""Their names of other prices, the unit that each is reported by, and for how many of it."""

_MILLION: Final = 1_000_000
_NONE: Final = Decimal(0)

_loading = threading.Lock()
_snapshots: list[DataSnapshot] = []


class PublishedModel(NamedTuple):
    """A model as it was found: whose it is, its name there, and the data."""

    provider: str
    name: str
    info: Any

    def rate(self, at: float) -> Rate:
        """What it costs at that time, in seconds since the epoch: prices change, and some by the hour."""
        return _rate(_Same(self.info.get_prices(datetime.fromtimestamp(at, UTC))))


def load_published() -> DataSnapshot:
    """
    Load the data, which takes a quarter of a second the first time. Thread-safe.

    Raises:
        MissingExtraError: The extra ``prices`` is not installed.
    """
    with _loading:
        if not _snapshots:
            try:
                from genai_prices.data import providers
                from genai_prices.data_snapshot import DataSnapshot
            except ImportError as error:
                raise MissingExtraError("Prices of models by name", "prices") from error
            _snapshots.append(DataSnapshot(providers=providers, from_auto_update=False))
        return _snapshots[0]


def published_version() -> str:
    """Name the data that is installed: ``genai-prices 0.2.3``. Raises `MissingExtraError`."""
    try:
        return f"genai-prices {importlib.metadata.version('genai-prices')}"
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingExtraError("Prices of models by name", "prices") from error


MAX_NAME: Final = 200
"""Characters of a model's name that are looked for: longer ones are not names."""


@lru_cache(maxsize=4_096)
def find_published(model: str, provider: str | None) -> PublishedModel | None:
    """
    Find *model*, of *provider* where that is known there; else of whoever offers a model of that name.

    Models may be named by clients, hence the bound of what is remembered.
    """
    if not 0 < len(model) <= MAX_NAME:
        return None
    snapshot = load_published()
    for whose in dict.fromkeys((provider, None)):
        try:
            found, info = snapshot.find_provider_model(model, None, whose, None)
        except LookupError:
            continue
        return PublishedModel(found.id, info.id, info)
    return None


class _Same:
    """A price of theirs as a key: they are mutable, and are told apart by what they are, not by what they say."""

    __slots__ = ("price",)

    def __init__(self, price: ModelPrice) -> None:
        self.price = price

    def __hash__(self) -> int:
        return id(self.price)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.price is other.price


@lru_cache(maxsize=4_096)
def _rate(same: _Same) -> Rate:
    given = {name: price for name, price in vars(same.price).items() if price is not None}
    units = {UNITS[name]: _base(price) for name, price in given.items() if name in UNITS}
    return Rate(
        _tokens(given),
        UnitPrice({name: price for (name, _), price in units.items()}, dict(units.keys())) if units else None,
        _base(given.get("requests_kcount", _NONE)) / 1_000,
        "output_image_mtok" in given or "output_video_mtok" in given,
    )


def _tokens(given: dict[str, Any]) -> TokenPrice | None:
    priced = {ours: given[theirs] for theirs, ours in TOKENS.items() if theirs in given}
    if not priced:
        return None
    starts = sorted({tier.start for price in priced.values() for tier in getattr(price, "tiers", ())})
    tiers = [TokenTier(start, **{kind: _from(price, start) for kind, price in priced.items()}) for start in starts]
    base = {"input": _NONE, "output": _NONE, **{kind: _base(price) for kind, price in priced.items()}}
    return TokenPrice(**base, per=_MILLION, tiers=tuple(tiers))  # type: ignore[arg-type]


def _base(price: Any) -> Decimal:
    base: Decimal = getattr(price, "base", price)
    return base


def _from(price: Any, start: int) -> Decimal:
    """What a kind costs from the tier on that begins at *start*."""
    reached = [tier.price for tier in getattr(price, "tiers", ()) if tier.start <= start]
    return reached[-1] if reached else _base(price)
