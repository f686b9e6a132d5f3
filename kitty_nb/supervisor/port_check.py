"""Whether a profile's server could listen on its port, before it is launched."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kitty_nb.errors import PortBusyError, ServerFailedError
from kitty_nb.supervisor.port_holder import holder_of, next_free_port, port_refusal
from kitty_nb.supervisor.record import record_of

if TYPE_CHECKING:
    from kitty_nb.config import ServerConfig


def refuse_busy_port(config: ServerConfig) -> None:
    """Try the port with a real bind. Run it in a worker thread.

    Raises:
        PortBusyError: Somebody listens there; the message says who, and what can be done.
        ServerFailedError: No port of this address can be listened on.
    """
    if problem := port_refusal(config.host, config.port):
        try:
            free_port = next_free_port(config.host, config.port)
        except ServerFailedError:  # no port will do: the address itself is wrong
            raise ServerFailedError(f"{problem} Correct LLAMACPP_HOST.") from None
        key = f"LLAMACPP_{config.profile.upper()}_PORT"
        holder = holder_of(config.host, config.port)
        record = holder and record_of(holder.pid, config.log_dir)
        whose = f" It is the server of the profile {record.config.profile!r}." if record else ""
        attachable = holder is not None and holder.attachable
        advice = f"Stop what holds it, or set {key} to another port: {free_port} is free."
        raise PortBusyError(f"{problem}{whose} {advice}", free_port, attachable=attachable)
