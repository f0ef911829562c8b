"""The page at /: one file without outside resources, and a policy that allows nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi.responses import HTMLResponse, Response

_HTML = Path(__file__).with_name("page.html").read_text(encoding="utf-8")


def _policy() -> str:
    """A Content-Security-Policy for this page only: its own script and style, and requests to this server."""
    allowed = {tag: _hash(tag) for tag in ("script", "style")}
    return "; ".join((
        "default-src 'none'",
        f"script-src {allowed['script']}",
        f"style-src {allowed['style']}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ))  # fmt: skip


def _hash(tag: str) -> str:
    (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", _HTML, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


_HEADERS = {
    "Content-Security-Policy": _policy(),
    "Cache-Control": "no-cache",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


async def page() -> Response:
    """The page. It holds no data; its script asks the API, with an API key where one is needed."""
    return HTMLResponse(_HTML, headers=_HEADERS)
