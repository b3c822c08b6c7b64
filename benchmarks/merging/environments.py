"""One virtual environment for each peer, made on first use under the versions of constraints.txt."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = {"mergekit": "mergekit==0.1.5", "fusion_bench": "fusion-bench==0.2.33", "peft": "peft==0.21.2"}
_REPORTED = ("hf-atm", "mergekit", "fusion-bench", "peft", "torch", "transformers", "safetensors", "numpy")


class NotInstalled(RuntimeError):
    """A peer's environment could not be made; the message ends with pip's last line."""


def environment_python(peer: str, folder: Path) -> Path:
    """Python of the peer's environment in `folder`, installed if it is not there yet.

    Raises:
        `NotInstalled`: if pip fails; nothing is left behind.
    """
    target = folder / peer
    python, mark = target / "bin" / "python", target / "installed.txt"
    if mark.exists() and mark.read_text(encoding="utf-8") == REQUIREMENTS[peer]:
        return python
    print(f"Installing {REQUIREMENTS[peer]} into {target}", flush=True)
    shutil.rmtree(target, ignore_errors=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt")]
    for command in ([sys.executable, "-m", "venv", str(target)], [str(python), *install, "torch", REQUIREMENTS[peer]]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(target, ignore_errors=True)
            raise NotInstalled(f"{REQUIREMENTS[peer]} cannot be installed: {last_line(done.stderr)}")
    mark.write_text(REQUIREMENTS[peer], encoding="utf-8")
    return python


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


def versions(python: Path) -> dict[str, str]:
    """Python and the packages that matter, as an environment has them."""
    script = (
        "import json, platform, sys\n"
        "from importlib import metadata\n"
        "found = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in metadata.distributions()}\n"
        "print(json.dumps({'python': platform.python_version()} | {n: found[n] for n in sys.argv[1:] if n in found}))"
    )
    done = subprocess.run([str(python), "-c", script, *_REPORTED], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)
