"""The official client for node against the demo. `make test-node` installs it and says where in `NODE_CLIENT`."""

import os
import shutil
import subprocess
from pathlib import Path

from support.live import live_server

SCRIPT = Path(__file__).with_name("node") / "check.mjs"


def test_the_official_client_for_node(tmp_path: Path) -> None:
    folder = Path(os.environ["NODE_CLIENT"])
    shutil.copy(SCRIPT, folder / SCRIPT.name)  # node looks for packages beside the script
    with live_server(tmp_path) as server:
        done = subprocess.run(
            ["node", SCRIPT.name, server.url], cwd=folder, capture_output=True, text=True, timeout=600, check=False
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ok " in done.stdout
