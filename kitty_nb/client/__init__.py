"""Clients of a running server: its address and key, and the requests to it."""

from kitty_nb.client.conversation import Answer as Answer
from kitty_nb.client.conversation import Piece as Piece
from kitty_nb.client.conversation import Timings as Timings
from kitty_nb.client.conversation import ToolCall as ToolCall
from kitty_nb.client.conversation import Usage as Usage
from kitty_nb.client.embeddings import Ranked as Ranked
from kitty_nb.client.protocol import Access as Access
from kitty_nb.supervisor.events import PromptProgress as PromptProgress
