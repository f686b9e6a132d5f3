"""The settings to edit, the memory they need, and the models folder."""

from __future__ import annotations

from contextlib import suppress
from html import escape
from typing import TYPE_CHECKING

from ipywidgets import Dropdown, GridBox, Text, Widget

from kitty_nb.catalog.demo_model import DEMO_NAME, write_demo_model
from kitty_nb.catalog.memory import Verdict
from kitty_nb.config import FlashAttention, ServerConfig, Speculation
from kitty_nb.errors import ConfigError, KittyError, ModelFileError
from kitty_nb.widgets.display import Line, button, labelled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from kitty_nb.catalog.memory import Allocation, MemoryPreview
    from kitty_nb.manager import ModelManager
    from kitty_nb.operation import Operation


_FIELDS = {
    "context_size": ("Context", "Context size in tokens; 0 uses the model's own"),
    "n_gpu_layers": ("GPU layers", "Layers to offload to the GPU; 999 for all"),
    "threads": ("Threads", "CPU threads"),
    "batch_size": ("Batch", "Prompt tokens processed per batch"),
    "parallel": ("Parallel", "Concurrent requests; they share the context"),
    "flash_attention": ("Flash attn", "Flash attention; saves memory and time where supported"),
    "speculation": (
        "Speculation",
        "Guess tokens ahead and check them together: faster where text"
        " repeats (n-gram), or with a smaller model of the same vocabulary (draft model)",
    ),
}
# The names of values while the fields are folded away.
_SHORT = {
    "n_gpu_layers": "GPU {}",
    "threads": "{} threads",
    "parallel": "{} slots",
    "flash_attention": "flash attention {}",
    "speculation": "speculation {}",
}
_ALL_LAYERS = "999"
_SPECULATION = [
    ("auto", ""),
    ("off", Speculation.OFF),
    ("n-gram", Speculation.NGRAM),
    ("draft model", Speculation.DRAFT),
]


class SettingsForm(GridBox):
    """One field per setting; an empty field leaves it to llama-server."""

    def __init__(self, config: ServerConfig, on_change: Callable[[], object]) -> None:
        self.fields: dict[str, Widget] = {
            name: Dropdown(**labelled(*words))
            if name in {"flash_attention", "speculation"}
            else Text(placeholder="auto", continuous_update=False, **labelled(*words))
            for name, words in _FIELDS.items()
        }
        self.fill(config)
        for field in self.fields.values():
            field.observe(lambda _change: on_change(), names="value")
        self.save = button("Save", "save", "Save the model and these settings to the .env file")
        super().__init__([*self.fields.values(), self.save])
        self.add_class("kitty-settings")

    def fill(self, config: ServerConfig, edits: Mapping[str, object] | None = None) -> None:
        """Fill the fields with the values of a config, and then with edits over them."""
        # Not None for auto: a dropdown shows None as nothing chosen.
        self._auto = FlashAttention.AUTO if config.flash_attention is FlashAttention.AUTO else ""
        choices = [("auto", self._auto), ("on", FlashAttention.ON), ("off", FlashAttention.OFF)]
        self.fields["flash_attention"].options = choices
        self.fields["speculation"].options = _SPECULATION
        self._given = self._texts(dict(config))
        self.apply({**dict(config), **(edits or {})})

    def apply(self, settings: Mapping[str, object]) -> None:
        """Put settings into the fields; those that are left out become automatic."""
        for name, text in self._texts(settings).items():
            self.fields[name].value = text

    @property
    def values(self) -> dict[str, object]:
        """The field values, as keywords for `ServerConfig.replace`."""
        return {name: field.value or None for name, field in self.fields.items()}

    @property
    def summary(self) -> str:
        """The values in a few words, e.g. `context 8192 · GPU all · 4 slots`."""
        words = [
            _SHORT.get(name, _FIELDS[name][0].lower() + " {}")
            .format("all" if name == "n_gpu_layers" and field.value == _ALL_LAYERS else field.value)
            .removesuffix("s" if field.value == "1" else "")
            for name, field in self.fields.items()
            if field.value not in {"", FlashAttention.AUTO}
        ]
        return " · ".join(words) or "all automatic"

    @property
    def edits(self) -> dict[str, object]:
        """The values that have been edited since the last `fill`."""
        shown = self.values.items()
        return {name: value for name, value in shown if (value or "") != self._given[name]}

    def differing(self, settings: Mapping[str, object]) -> list[str]:
        """Describe the settings that differ from the fields, e.g. `Context 8192`."""
        return [
            f"{_FIELDS[name][0]} {text or 'auto'}"
            for name, text in self._texts(settings).items()
            if text != self.fields[name].value
        ]

    def _texts(self, settings: Mapping[str, object]) -> dict[str, str]:
        values = {name: settings.get(name) for name in self.fields}
        texts = {name: "" if value is None else str(value) for name, value in values.items()}
        if texts["flash_attention"] not in {"on", "off"}:
            texts["flash_attention"] = self._auto
        return texts


_TONES = {
    Verdict.FITS: "good",
    Verdict.TIGHT: "warn",
    Verdict.WILL_NOT_FIT: "bad",
    Verdict.UNKNOWN: "idle",
}
_GB, _MB = 1e9, 1e6
_WORTH_SAYING = _GB / 10  # bytes


class MemoryLine(Line):
    """A sentence about memory, or about an invalid setting; hidden while no model is chosen.

    Args:
        manager: It computes the figures, and calls back on its own thread.
        wanted: Returns the settings that a start would use; if it raises a `KittyError`, there is
            nothing to show.
    """

    preview: MemoryPreview | None = None  # what is shown; None while nothing is

    def __init__(self, manager: ModelManager, wanted: Callable[[], ServerConfig]) -> None:
        super().__init__("kitty-memory")
        self._manager, self._wanted = manager, wanted
        self._looking: Operation[MemoryPreview] | None = None

    def refresh(self) -> None:
        """Compute the preview again, because the model or a setting has changed.

        Callable from any thread but the manager's, one call at a time. A preview in progress is
        cancelled.
        """
        with suppress(KittyError):  # the manager may have been closed
            self.stop()
            try:
                config = self._wanted()
            except KittyError as error:
                self._manager.run(self._complain, error)
            else:
                self._looking = self._manager.preview_memory(config, self._show)

    def stop(self) -> None:
        """Cancel the preview in progress, if there is one."""
        if self._looking is not None:
            self._looking.cancel()

    async def _complain(self, error: KittyError) -> None:
        """Say what is wrong with a setting; nothing where no model is chosen."""
        self.preview = None
        self.write(_setting_sentence(error) if isinstance(error, ConfigError) else "")

    def _show(self, preview: MemoryPreview) -> None:
        self.write(memory_line(preview))
        self.preview = preview


def _setting_sentence(error: ConfigError) -> str:
    """Describe what is wrong with the fields, as HTML, by their names on screen."""
    sentences = (
        f"{escape(_FIELDS[one.key][0] if one.key in _FIELDS else one.key)} “{escape(one.value)}”:"
        f" {escape(one.reason)} {escape(one.fix)}"
        for one in error.problems
    )
    return f"<span class='kitty-bad kitty-wrong'>{'<br>'.join(sentences)}</span>"


def memory_line(preview: MemoryPreview) -> str:
    """Draw a few words, e.g. `Memory 442 MB of 23.0 GB · fits`; hover and focus show the rest."""
    needs, pools = preview.requirement, preview.allocations
    of = f" of {_size(pools[0].pool.free)}" if len(pools) == 1 else ""
    size = f" {_size(needs.known)}{of}" if pools else ""
    short = f"Memory{size} · <b class='kitty-{_TONES[preview.verdict]}'>{preview.verdict}</b>"
    rest = f"<span class='kitty-tip-text' role='tooltip'>{memory_sentence(preview)}</span>"
    return f"<span class='kitty-tip' tabindex='0'>{short}{rest}</span>"


def memory_sentence(preview: MemoryPreview) -> str:
    """Describe whether a model fits, as HTML.

    E.g. `Memory: needs about 21.4 GB of 24.0 GB free for a context of 32,768 · weights 18.9 GB · KV
    cache 2.1 GB · compute 412 MB — tight; largest context that fits: 24,576`. A second line
    has the share of each pool, if there are others than the machine's RAM.
    """
    tone = f"kitty-{_TONES[preview.verdict]}"
    if not preview.allocations:
        return f"Memory: <span class='{tone}'>unknown</span>. {escape(preview.problem or '')}"
    plain = [one.pool.name for one in preview.allocations] == ["RAM"]
    free = f" of {_free(preview.allocations[0])}" if plain else ""
    needs = preview.requirement
    if needs.total is None or needs.cache is None or needs.compute is None:
        what = f"weights <b>{_size(needs.weights)}</b>{free} · KV cache and compute unknown"
    else:
        context = f" for a context of {preview.context:,}" if preview.context else ""
        what = (
            f"needs about <b>{_size(needs.total)}</b>{free}{context}"
            f" · weights {_size(needs.weights)} · KV cache {_size(needs.cache)}"
            f" · compute {_size(needs.compute)}"
        )
    line = f"Memory: {what} — <b class='{tone}'>{preview.verdict}</b>"
    if (most := preview.largest_context) is not None:
        whole = "the model's maximum context fits"
        fits = whole if preview.whole_context else "largest context that fits"
        if not (preview.whole_context and most == preview.context):
            line += f"; {fits}: {most:,}" if most else "; no context size fits"
    pools = " · ".join(
        f"{escape(one.pool.name)} {_size(one.requirement.known)} of {_free(one)}"
        for one in preview.allocations
    )
    return line if plain else f"{line}<br><span class='kitty-fact'>{pools}</span>"


def _free(one: Allocation) -> str:
    returned = one.pool.returned
    held = f" (with {_size(returned)} released by the running server)"
    return f"{_size(one.pool.free)} free{held if returned >= _WORTH_SAYING else ''}"


def _size(count: float) -> str:
    """Format bytes for people, e.g. `21.4 GB` or `412 MB`."""
    return f"{count / _MB:.0f} MB" if count < _GB - _MB / 2 else f"{count / _GB:.1f} GB"


def ensure_models_dir(folder: Path) -> str | None:
    """Write a small demo model into an empty models folder; create the default one if necessary.

    Returns:
        What was done, to tell the user; None if the folder has something in it.

    Raises:
        ModelFileError: The folder does not exist, or can't be written to.
    """
    try:
        hidden = [path.name.startswith(".") for path in folder.iterdir()]
    except FileNotFoundError:
        hidden = []
        if folder != ServerConfig.model_fields["models_dir"].default:
            problem = f"The folder {folder} does not exist. Create it, or correct"
            raise ModelFileError(f"{problem} LLAMACPP_MODELS_DIR, then press Rescan.") from None
    except OSError as error:
        raise ModelFileError(
            f"Can't read {folder} ({error.strerror}). Check LLAMACPP_MODELS_DIR and the folder's"
            " permissions, then press Rescan."
        ) from error
    if not all(hidden):
        return None
    write_demo_model(folder / DEMO_NAME)
    return f"{folder} had no models, so kitty_nb wrote a small demo model there."
