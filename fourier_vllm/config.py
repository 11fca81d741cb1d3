"""Options of the plugin, `--additional-config '{"fourier": {...}}'`; needs no torch, no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NamedTuple

from fourier_vllm._text import SUBJECT, nearest, show
from fourier_vllm.recipe import (
    DEFAULT_LOCAL_WINDOW,
    DEFAULT_PAGE_SIZE,
    DEFAULT_SINK_TOKENS,
    MEASURED_TARGET,
    PAGE_SIZES,
    PREDICTED_TARGET,
    TARGETS,
)

if TYPE_CHECKING:
    from fourier_vllm.recipe import Recipe

PREFILLS = ("windowed", "exact")
PROMPT_ATTENTIONS = ("auto", "flash", "xformers", "torch")
LOCAL_BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
WINDOW_MIN, WINDOW_MAX, WINDOW_STEP = 16, 65536, 16
ORIGIN = f"{SUBJECT}: additional_config fourier"
# Recipes that are no files; files of these names are ./measured and ./weights.
MEASURED, WEIGHTS = "measured", "weights"
GONE = "own-text"  # until MEASURED took its place


class Option(NamedTuple):
    """One row of the documentation's table of options."""

    name: str
    default: str
    values: str
    help: str


class Geometry(NamedTuple):
    """Token counts in force once the recipe is known.

    Attributes
    ----------
    page_size, local_window, sink_tokens : int
        Tokens of a page, recent tokens kept raw, first tokens kept raw.
    local_block_size : int or None
        Tokens of a raw block; None lets the engine choose.
    """

    page_size: int
    local_window: int
    sink_tokens: int
    local_block_size: int | None


def _option(default: Any, values: str, help: str, shown: str = "") -> Any:
    return field(default=default, metadata={"values": values, "help": help, "shown": shown})


def _else(default: int) -> str:
    return f"the recipe's, else {default}"


@dataclass(frozen=True)
class FourierConfig:
    """Checked options; None means "from the recipe", see `geometry`.

    Raises
    ------
    ValueError
        One sentence: the option, what was expected, what was found, the way out.
    """

    target: str | None = _option(
        None,
        ", ".join(TARGETS),
        "How small pages are where no recipe file is given.",
        shown=f"{MEASURED_TARGET} with a measured recipe, else {PREDICTED_TARGET}",
    )
    recipe: str | None = _option(
        None,
        f"path, {MEASURED}, {WEIGHTS}",
        "Recipe file, or what the engine does without one: measure its model, or predict bits from "
        "the weights.",
        shown=f"bundled if one fits, else {MEASURED} on a GPU, {WEIGHTS} on a CPU",
    )
    calibration_text: str | None = _option(
        None, "path", "Text that the engine measures its model on.", shown="what the package ships"
    )
    prefill: str = _option(
        "windowed",
        ", ".join(PREFILLS),
        "Whether prompt tokens read sealed pages beyond the window, or exact K and V.",
    )
    prompt_attention: str = _option(
        "auto",
        ", ".join(PROMPT_ATTENTIONS),
        "Whose kernels attend prompts on a GPU; auto takes the first of these that runs.",
    )
    page_size: int | None = _option(
        None, "32, 64, 128, 256", "Tokens of a sealed page.", shown=_else(DEFAULT_PAGE_SIZE)
    )
    local_window: int | None = _option(
        None,
        f"{WINDOW_MIN} to {WINDOW_MAX}, a multiple of {WINDOW_STEP}",
        "Recent tokens kept raw.",
        shown=_else(DEFAULT_LOCAL_WINDOW),
    )
    sink_tokens: int | None = _option(
        None, "0 to page_size", "First tokens kept raw.", shown=_else(DEFAULT_SINK_TOKENS)
    )
    local_block_size: int | None = _option(
        None,
        "8, 16, 32, 64, 128, 256 up to page_size",
        "Tokens of one block of raw K and V.",
        shown="the one that wastes least",
    )

    def __post_init__(self) -> None:
        if self.target is not None:
            _choice("target", self.target, tuple(TARGETS))
        _choice("prefill", self.prefill, PREFILLS)
        _choice("prompt_attention", self.prompt_attention, PROMPT_ATTENTIONS)
        path, page, window = self.recipe, self.page_size, self.local_window
        if path is not None and (not isinstance(path, str) or not path.strip()):
            _refuse(
                "recipe", "the path of a JSON file or null", path, "give a path or leave it out"
            )
        if path == GONE:
            raise ValueError(
                f"{ORIGIN}.recipe {show(GONE)} was replaced by {show(MEASURED)}: write {show(MEASURED)},"
                f" or ./{GONE} for a file of that name."
            )
        if path in (MEASURED, WEIGHTS) and self.target == "lossless":
            _refuse("recipe", "a path or null with target lossless", path, "leave it out")
        text = self.calibration_text
        if text is not None and (not isinstance(text, str) or not text.strip()):
            _refuse("calibration_text", "the path of a text file or null", text, "leave it out")
        if text is not None and (path not in (None, MEASURED) or self.target == "lossless"):
            found = f"one beside recipe {path!r}" if path else "one beside target lossless"
            raise ValueError(
                f"{ORIGIN}.calibration_text is for recipes that the engine measures, found {found}: "
                "leave one of them out."
            )
        if page is not None and (type(page) is not int or page not in PAGE_SIZES):
            _refuse("page_size", "32, 64, 128, 256 or null", page, "choose one of these")
        if window is not None and (
            type(window) is not int
            or not WINDOW_MIN <= window <= WINDOW_MAX
            or window % WINDOW_STEP
        ):
            rule = f"a multiple of {WINDOW_STEP} from {WINDOW_MIN} to {WINDOW_MAX}, or null"
            _refuse("local_window", rule, window, f"try {_near(window)}")
        _check_page(self, page or max(PAGE_SIZES))

    @classmethod
    def from_engine(cls, vllm_config: Any) -> FourierConfig:
        """The options of an engine's config; raises as `from_dict` does."""
        additional = vllm_config.additional_config
        return cls.from_dict(additional.get("fourier") if isinstance(additional, Mapping) else None)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any] | None) -> FourierConfig:
        """Check the value of `fourier` in vLLM's additional config; None gives the defaults.

        Raises
        ------
        ValueError
            Not an object, an unknown option, or a value that cannot work.
        """
        if options is None:
            return cls()
        if not isinstance(options, Mapping):
            raise ValueError(
                f"{ORIGIN} must be an object of options, found {show(options)}: write"
                """ --additional-config '{"fourier": {"target": "balanced"}}'."""
            )
        names = [option.name for option in fields(cls)]
        for name in options:
            if name not in names:
                raise ValueError(
                    f"{ORIGIN} has the unknown option {show(name)}: {nearest(name, names)}."
                )
        return cls(**options)

    @property
    def asks_to_measure(self) -> bool:
        """Whether the user wants the engine to measure its model."""
        return self.recipe == MEASURED or self.calibration_text is not None

    def geometry(self, recipe: Recipe | None = None) -> Geometry:
        """Fill what the options leave open from a recipe, or from the defaults.

        Raises
        ------
        ValueError
            The page size is not the recipe's, or an option does not fit the page.
        """
        page = recipe.page_size if recipe else self.page_size or DEFAULT_PAGE_SIZE
        if self.page_size not in (None, page):
            # Bits and coefficients were chosen for one page size.
            way_out = "leave it out, or calibrate with this page size"
            _refuse("page_size", f"{page}, the recipe's", self.page_size, way_out)
        _check_page(self, page)
        window, sinks = self.local_window, self.sink_tokens
        if window is None:
            window = recipe.local_window if recipe else DEFAULT_LOCAL_WINDOW
        if sinks is None:
            sinks = recipe.sink_tokens if recipe else DEFAULT_SINK_TOKENS
        return Geometry(page, window, sinks, self.local_block_size)


def options() -> list[Option]:
    """Every option in order, for the documentation."""
    return [
        Option(
            option.name,
            option.metadata["shown"] or str(option.default),
            option.metadata["values"],
            option.metadata["help"],
        )
        for option in fields(FourierConfig)
    ]


def _refuse(name: str, expected: str, found: object, way_out: str) -> None:
    raise ValueError(f"{ORIGIN}.{name} must be {expected}, found {show(found)}: {way_out}.")


def _choice(name: str, value: object, valid: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in valid:
        close = get_close_matches(value[:64], valid, 1, 0.5) if isinstance(value, str) else []
        way_out = f"did you mean {close[0]!r}" if close else "choose one of these"
        _refuse(name, f"one of {', '.join(valid)}", value, way_out)


def _near(window: object) -> int:
    if type(window) is not int:
        return DEFAULT_LOCAL_WINDOW
    return min(WINDOW_MAX, max(WINDOW_MIN, -(-window // WINDOW_STEP) * WINDOW_STEP))


def _check_page(config: FourierConfig, page: int) -> None:
    """Check what has to fit into a page of `page` tokens."""
    sinks, block = config.sink_tokens, config.local_block_size
    if sinks is not None and (type(sinks) is not int or not 0 <= sinks <= page):
        rule = f"an integer from 0 to {page}, a page, or null"
        _refuse("sink_tokens", rule, sinks, f"try {DEFAULT_SINK_TOKENS}")
    valid = [size for size in LOCAL_BLOCK_SIZES if page % size == 0]
    if block is not None and (type(block) is not int or block not in valid):
        rule = f"a multiple of 8 that divides a page of {page}, or null"
        _refuse("local_block_size", rule, block, f"choose one of {', '.join(map(str, valid))}")
