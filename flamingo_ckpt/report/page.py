"""What every HTML page has: its policy, its style sheet, its header, and the report as data."""

from __future__ import annotations

import base64
import hashlib
import re
import shlex
from collections.abc import Mapping
from functools import lru_cache, partial
from importlib import resources
from typing import TYPE_CHECKING, Any

from flamingo_ckpt.report import parity_words
from flamingo_ckpt.report.document import Report, to_document
from flamingo_ckpt.tensors import escape

if TYPE_CHECKING:
    import jinja2

_TICKS = re.compile("`([^`]+)`")


def render_page(
    report: Report,
    template: str,
    context: Mapping[str, Any],
    *,
    parity: Report | None = None,
    script: str = "",
) -> str:
    """A page; the JSON document is embedded in it, in `script#report`.

    Args:
        report: what the page is about.
        template: a file of this room that extends `page.html.jinja`.
        context: what the template asks for; of every page, `word` and `sentence`.
        parity: the report whose passes are drawn, where it is not `report` itself.
        script: a file of this room with a script, if any; the page is complete without it.
    """
    from markupsafe import Markup

    css, code = _data("page.css"), _data(script) if script else ""
    page = _environment().get_template(template)
    return page.render(
        **context,
        report=report,
        gates=partial(parity_words.gates, parity or report),
        command=[shlex.quote(word) for word in ("flamingo-ckpt", *report.argv)],
        # style sheet and script are ours, and hold nothing of the report
        css=Markup(css),  # noqa: S704
        script=Markup(code),  # noqa: S704
        policy=_policy(css, code),
        document=to_document(report),
    )


def _data(name: str) -> str:
    return resources.files("flamingo_ckpt.report").joinpath(name).read_text("utf-8")


def _policy(css: str, script: str) -> str:
    """Nothing may be loaded or sent; one style sheet and one script are allowed, by their hash."""
    allowed = ["default-src 'none'", f"style-src '{_digest(css)}'"]
    allowed += [f"script-src '{_digest(script)}'"] if script else []
    return "; ".join([*allowed, "base-uri 'none'", "form-action 'none'"])


def _digest(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest())
    return f"sha256-{digest.decode('ascii')}"


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """One for the process: templates are compiled once."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_data),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": True}
    environment.filters |= {
        "short": parity_words.short,
        "cosine": parity_words.cosine,
        "share": parity_words.share,
        "used": parity_words.used,
        "outcome": parity_words.outcome,
        "greedy": parity_words.greedy_text,
        "weights": parity_words.weights_text,
        "suspect": parity_words.suspect_text,
        "confirmation": parity_words.confirmation,
        "trial": parity_words.trial_text,
        "ticks": ticks,
    }
    return environment


def _printable(value: Any) -> Any:
    """What is text and not yet HTML, without controls and what else cannot be seen."""
    return escape(value) if type(value) is str else value


def ticks(text: str) -> Any:
    """What stands in backticks as code."""
    from markupsafe import Markup

    parts = _TICKS.split(escape(text))
    marked = (Markup("<code>{}</code>").format(part) for part in parts[1::2])
    # even places are the text between
    return Markup("").join(
        part for pair in zip(parts[::2], [*marked, ""], strict=True) for part in pair
    )
