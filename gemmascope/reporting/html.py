"""What every HTML page of ours has in common: one file that needs nothing else, legible on a phone and on paper."""

import base64
from html import escape

STYLE = """
:root { --ink: #1c1c1c; --soft: #595959; --line: #d9d9d9; --good: #00614a; --bad: #a63c00; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
p { max-width: 46rem; margin: .5rem 0; }
figure { margin: 1.4rem 0; break-inside: avoid; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { color: var(--soft); font-size: .875rem; max-width: 46rem; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; font-size: .8125rem; overflow-wrap: normal; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
@media print {
  @page { margin: 1.4cm; }
  body { max-width: none; padding: 0; font-size: 9.5pt; }
  h2 { margin-top: 1.2rem; break-after: avoid; }
  figure img { max-height: 10.5cm; }
  pre { break-inside: avoid; white-space: pre-wrap; border: 1px solid var(--line); }
}
"""

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def document(title: str, body: str, style: str = "") -> str:
    """A page. title: text. body: HTML. style: rules beyond `STYLE`."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def section(title: str, content: str) -> str:
    """title: text. content: HTML."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def figure(png: bytes, text: str, caption: bool = False, source: str = "") -> str:
    """An image within the page. text: what it shows, for those who do not see it; with ``caption`` also below it, and
    ``source``, what its figures are of."""
    of = f" <small>({escape(source)})</small>" if source else ""
    below = f"<figcaption>{escape(text)}{of}</figcaption>" if caption else ""
    source = base64.b64encode(png).decode()
    return f'<figure><img alt="{escape(text)}" src="data:image/png;base64,{source}">{below}</figure>'
