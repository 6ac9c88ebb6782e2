"""Written pages as tests read them."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "line", "circle", "polyline", "link", "input"}


class Page(HTMLParser):
    """Collects headings, links and scripts, and checks that tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.addresses, self.alts, self.scripts = [], [], [], [], 0
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[name] for name in ("src", "href", "action", "data") if name in attrs]
        if tag == "img":
            self.alts.append(attrs.get("alt"))
        self.scripts += tag == "script"
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.headings.append("")

    def handle_endtag(self, tag):
        if tag not in VOID and tag not in ("html", "head", "body"):
            while self.open[-1] in ("html", "head", "body") and self.open[-1] != tag:
                raise AssertionError(f"</{tag}> without its start")
            assert self.open.pop() == tag
        elif tag in ("html", "head", "body"):
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data


def read(path):
    return Page(path.read_text("utf-8"))
