"""`loramux serve` under an audit hook (PEP 578): `python audited_server.py serve FLAGS...` writes to the file that
`AUDIT_FILE` names what the API's process does that a hostile client might want of it, a line each.
"""

import os
import sys
from pathlib import Path
from typing import Any

from loramux.server import cli

WATCHED = ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn",
           "pickle.find_class", "code.__new__", "webbrowser.open", "urllib.Request")  # fmt: skip
OUT = os.open(Path(os.environ["AUDIT_FILE"]), os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Called by the interpreter."""
    if event in WATCHED:
        os.write(OUT, f"{event} {arguments!r:.300}\n".encode(errors="replace"))


if __name__ == "__main__":
    sys.addaudithook(audit)
    sys.exit(cli.main())
