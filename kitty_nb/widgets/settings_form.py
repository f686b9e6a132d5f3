"""The settings that people change between runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipywidgets import Button, Dropdown, GridBox, Text, Widget

from kitty_nb.config import FlashAttention
from kitty_nb.widgets.accessible import labelled

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kitty_nb.config import ServerConfig

_NUMBERS = {
    "context_size": ("Context", "Tokens of context; 0 is what the model was trained with"),
    "n_gpu_layers": ("GPU layers", "Layers to put on the GPU; 999 is all of them"),
    "threads": ("Threads", "Processor threads"),
    "batch_size": ("Batch", "Tokens of a prompt worked on at once"),
    "parallel": ("Parallel", "Requests served at once; they share the context"),
}
_FLASH_ATTENTION = "Flash attn", "Flash attention, which saves memory and time where it can be used"
_LABELS = {name: label for name, (label, _) in _NUMBERS.items()} | {
    "flash_attention": _FLASH_ATTENTION[0]
}


class SettingsForm(GridBox):
    """One field per setting; an empty field leaves it to llama-server.

    Args:
        config: The values to begin with.
        on_change: Called when a value has changed.
    """

    def __init__(self, config: ServerConfig, on_change: Callable[[], object]) -> None:
        self.fields: dict[str, Widget] = {
            name: Text(placeholder="auto", continuous_update=False, **labelled(*words))
            for name, words in _NUMBERS.items()
        }
        self.fields["flash_attention"] = Dropdown(**labelled(*_FLASH_ATTENTION))
        self.fill(config)
        for field in self.fields.values():
            field.observe(lambda _change: on_change(), names="value")
        self.save = Button(
            description="Save",
            icon="save",
            tooltip="Write the model and these settings into the .env file",
        )
        super().__init__([*self.fields.values(), self.save])
        self.add_class("kitty-settings")

    def fill(self, config: ServerConfig, edits: Mapping[str, object] | None = None) -> None:
        """Put the values of a config into the fields, and over them what has been edited."""
        # Not None for auto: a dropdown shows None as nothing chosen.
        self._auto = FlashAttention.AUTO if config.flash_attention is FlashAttention.AUTO else ""
        choices = [("auto", self._auto), ("on", FlashAttention.ON), ("off", FlashAttention.OFF)]
        self.fields["flash_attention"].options = choices
        self.apply({**dict(config), **(edits or {})})

    def edits(self, config: ServerConfig) -> dict[str, object]:
        """What is in the fields and differs from a config, as keywords for its `replace`."""
        given, values = dict(config), self.changes()
        return {
            name: values[name]
            for name, field in self.fields.items()
            if field.value != self._value(name, given)
        }

    def differing(self, settings: Mapping[str, object]) -> list[str]:
        """Name what other settings say that is not in the fields, e.g. `Context 8192`."""
        return [
            f"{_LABELS[name]} {value or 'auto'}"
            for name, field in self.fields.items()
            if (value := self._value(name, settings)) != field.value
        ]

    def apply(self, settings: Mapping[str, object]) -> None:
        """Put settings into the fields; those that are left out become automatic."""
        for name, field in self.fields.items():
            field.value = self._value(name, settings)

    def _value(self, name: str, settings: Mapping[str, object]) -> str:
        value = settings.get(name)
        if name == "flash_attention":
            return FlashAttention(value) if value in {"on", "off"} else self._auto
        return "" if value is None else str(value)

    def changes(self) -> dict[str, object]:
        """What is in the fields, as keywords for `ServerConfig.replace`."""
        return {name: field.value or None for name, field in self.fields.items()}
