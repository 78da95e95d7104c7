"""`/`: a page to chat with the model and to watch the memory, in one file."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import Response

PAGE = Path(__file__).with_name("web_page.html")
router = APIRouter()


@router.api_route("/", methods=["GET", "HEAD"])
async def page() -> Response:
    """Return the page. It needs no key: what it asks for does. Its addresses are relative."""
    return Response(page_bytes(), headers=page_headers(), media_type="text/html")


@cache
def page_bytes() -> bytes:
    """Return the file."""
    return PAGE.read_bytes()


@cache
def page_headers() -> dict[str, str]:
    """Return headers by which a browser runs the file's own script and style and nothing else.

    The script may ask this server only. Texts cannot become elements (`require-trusted-types-for`).
    """
    allowed = {
        "default-src": "'none'",
        "script-src": _hashes("script"),
        "style-src": _hashes("style"),
        "connect-src": "'self'",
        "img-src": "data:",  # its icon
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in allowed.items()),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",  # for browsers that do not know frame-ancestors
    }


def _hashes(element: str) -> str:
    """Return the source expressions of the file's elements of a name."""
    contents = re.findall(rb"<%b>(.*?)</%b>" % ((element.encode(),) * 2), page_bytes(), re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'" for content in contents)
