"""What a run ran on: machine, versions, command and commit, written beside its results.

The record is meant to be published with the scores, so it never holds a user name, a home directory
or a host name.
"""

from __future__ import annotations

import getpass
import os
import platform
import re
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_DISTRIBUTION = "vlpjax"
# Read when the package runs from a checkout that was never installed, and so has no list of its own.
_USUAL_PACKAGES = (
    *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml_collections", "numpy", "pillow"),
    *("rich", "tensorboardX", "tokenizers", "sentencepiece"),
)
# Users that every container has: their names tell nothing, and replacing them would garble paths.
_IMPERSONAL_USERS = frozenset({"root", "user", "nobody"})


def describe_environment(command: Sequence[str], extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Describes command, Python, packages, machine and commit as JSON-like values.

    Args:
        command: the arguments that started the run.
        extra: more entries for the top level ("precision", "mesh", "parameters").

    Returns:
        A dict with ``command``, ``python``, ``jax``, ``packages``, ``machine`` (``cpu``, ``cores``,
        ``memory_gb``, ``platform``, ``devices``), ``git`` (``None`` outside a checkout) and all of ``extra``.
    """
    import jax

    record = {
        "command": list(command),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "packages": _package_versions(),
        "machine": {
            "cpu": _cpu_model(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
            "platform": _platform(),
            "devices": {
                "platform": jax.default_backend(),
                "kind": jax.devices()[0].device_kind,
                "count": jax.device_count(),
                "processes": jax.process_count(),
            },
        },
        "git": _git_state(Path(__file__).resolve().parents[1]),
    }
    return anonymous(record | dict(extra or {}))


def anonymous(value: Any) -> Any:
    """Replaces home directories, the user's and the host's name in every string inside ``value``."""
    rules = _personal_patterns()
    return _replace(value, rules)


def _replace(value: Any, rules: Sequence[tuple[re.Pattern[str], str]]) -> Any:
    if isinstance(value, str):
        for pattern, replacement in rules:
            value = pattern.sub(replacement, value)
        return value
    if isinstance(value, Mapping):
        return {_replace(name, rules): _replace(item, rules) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replace(item, rules) for item in value]
    return value


def _personal_patterns() -> list[tuple[re.Pattern[str], str]]:
    rules = []
    home = os.path.expanduser("~").rstrip("/")
    if home not in ("", "~"):
        rules.append((re.compile(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])"), "~"))
    rules.append((re.compile(r"(?<![\w.-])/(?:home|Users)/[^/\s]+"), "~"))
    for name, replacement in ((_user_name(), "<user>"), (socket.gethostname(), "<host>")):
        if name and name not in _IMPERSONAL_USERS and name != "localhost":
            rules.append((re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])"), replacement))
    return rules


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # A container may run under a number that has no name.
        return ""


def _package_versions() -> dict[str, str]:
    versions = {}
    for name in _declared_packages():
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # An optional dependency that is not there.
            continue
    return versions


def _declared_packages() -> list[str]:
    try:
        requirements = metadata.requires(_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return list(_USUAL_PACKAGES)
    names = {re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in requirements}
    return sorted(names | {"jaxlib"}, key=str.lower)


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except FileNotFoundError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _platform() -> str:
    try:
        system = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        system = f"{platform.system()} {platform.release()}"
    return f"{system} {platform.machine()}"


def _git_state(package: Path) -> dict[str, Any] | None:
    """Commit of the checkout that holds this package; ``None`` if no checkout tracks it."""
    # An installed copy may lie inside another project's checkout (a virtual environment).
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git(package, "rev-parse", "HEAD")
    if commit is None:
        return None
    return {"commit": commit, "dirty": bool(_git(package, "status", "--porcelain", "--untracked-files=no"))}


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(directory), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
