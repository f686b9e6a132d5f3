"""What certificates are verified with, for requests to servers on this machine and elsewhere."""

from __future__ import annotations

import ssl

from kitty_nb.config import user_variables
from kitty_nb.errors import KittyError


def tls_context(url: str) -> ssl.SSLContext:
    """Return what verifies the certificate of a server.

    The authorities are those of Mozilla and of the system, or of the file that `SSL_CERT_FILE`
    names. For plain HTTP there are none: loading them takes 30 ms of every start.

    Args:
        url: The server's address.

    Raises:
        KittyError: That file can't be used.
    """
    if not url.startswith("https:"):
        return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    import httpx  # noqa: PLC0415 (a start should not wait for it)

    try:
        context = httpx.create_ssl_context()
        context.load_default_certs()
    except OSError as error:
        named = user_variables(("SSL_CERT_FILE", "SSL_CERT_DIR")).items()
        variable, place = next(iter(named), ("the system", "the usual place"))
        problem = f"There are no certificates in {place}, which {variable} names ({error})."
        raise KittyError(problem) from None
    return context
