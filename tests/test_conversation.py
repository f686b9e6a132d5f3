"""What is asked of a server, and what is refused before it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from kitty_nb.client.conversation import Form, chat_request
from kitty_nb.errors import KittyError


@dataclass(frozen=True)
class Served:
    alias: str = "demo"
    to_choose: tuple[str, ...] = ()
    sees: bool = False


PICTURE = "data:image/png;base64,"


def ask(server: Served = Served(), *images: str, **options: Any) -> dict[str, Any]:
    return chat_request(server, "Hello", images, None, options)


def test_a_prompt_becomes_a_request() -> None:
    assert ask() == {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}
    assert ask(model="other", temperature=0).items() >= {"model": "other", "temperature": 0}.items()
    formed = chat_request(Served(), "Hello", (), Form({"type": "integer"}), {})
    assert formed["response_format"]["json_schema"]["schema"] == {"type": "integer"}


def test_pictures_are_for_models_that_see() -> None:
    (message,) = ask(Served(sees=True), PICTURE)["messages"]
    assert message["content"][0]["image_url"]["url"] == PICTURE
    with pytest.raises(KittyError, match="demo runs without a projector"):
        ask(Served(), PICTURE)


def test_a_router_without_a_model_needs_the_name_of_one() -> None:
    router = Served(to_choose=("a", "b"))
    assert ask(router, model="b")["model"] == "b"
    with pytest.raises(KittyError, match=r"Name one with chat.*: a, b\."):
        ask(router)
