"""Files into text: plain text, Markdown, HTML, PDF, DOCX. Runs in a child process (`child`), because it may blow up.

Nothing is fetched: links, images and external entities stay what they are. Headings come out as Markdown's, so that
chunking sees them.
"""

from __future__ import annotations

import codecs
import re
import zipfile
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, Final
from xml.etree import ElementTree

from deployments.retrieval.records import ErrorCode

_MAX_DOCX_PART_BYTES: Final = 256 * 2**20
_OLE_MAGIC: Final = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_BOMS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_BINARY: Final = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\x7fELF": "a program",
    b"SQLite format 3": "a database",
}

_HIDDEN: Final = {"script", "style", "noscript", "template", "svg", "head", "iframe", "object", "select"}
_BLOCKS: Final = {
    *("p", "div", "section", "article", "header", "footer", "main", "nav", "aside", "ul", "ol", "dl", "dd", "dt"),
    *("table", "blockquote", "figure", "figcaption", "form", "fieldset", "address", "details", "summary", "pre"),
}


class Unreadable(Exception):
    """The file's own fault, in words its owner can act on."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code: ErrorCode = code
        self.message = message


def text_of(path: Path, filename: str, *, max_chars: int) -> str:
    """Return the text of a file.

    Args:
        path: Where its bytes are.
        filename: As uploaded; its ending is a hint, its content decides.
        max_chars: More text than this is refused.

    Raises:
        Unreadable: It is broken, empty, too long, or of a kind that is not read.
    """
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        raise Unreadable("invalid_file", "The file is empty.")
    suffix = Path(filename.lower()).suffix
    if b"%PDF-" in head or suffix == ".pdf":
        if b"%PDF-" not in head:
            raise Unreadable("invalid_file", "The file is named .pdf but is not a PDF.")
        text = _joined(_pdf(path), max_chars)
    elif head.startswith(b"PK\x03\x04") or suffix == ".docx":
        text = _joined(_docx(path), max_chars)
    elif head.startswith(_OLE_MAGIC):
        raise Unreadable(
            "unsupported_file", "Old Word, Excel and PowerPoint files are not read: save it as .docx or PDF."
        )
    else:
        for magic, what in _BINARY.items():
            if head.startswith(magic):
                raise Unreadable("unsupported_file", f"The file is {what}, not a document with text.")
        if path.stat().st_size > 4 * max_chars:
            raise _too_long(max_chars)
        text = decoded(path.read_bytes())
        if suffix in (".html", ".htm", ".xhtml") or re.match(r"\s*(<!doctype html|<html)", text[:512], re.IGNORECASE):
            text = html_text(text)
        if len(text) > max_chars:
            raise _too_long(max_chars)
    text = _clean(text)
    if not text.strip():
        raise Unreadable("invalid_file", "The file has no text. Scanned pages need text recognition before upload.")
    return text


def decoded(data: bytes) -> str:
    """Return text bytes as text: by their mark, as UTF-8, or as Latin script of one byte a character.

    Raises:
        Unreadable: They are not text, or in an encoding that cannot be told.
    """
    for bom, encoding in _BOMS:
        if data.startswith(bom):
            return data.decode(encoding, "replace")
    sample = data[: 2**20]
    controls = sum(sample.count(bytes([c])) for c in (*range(9), 11, *range(14, 27), *range(28, 32)))
    if b"\0" in sample or controls > len(sample) / 200:
        raise Unreadable("unsupported_file", "The file is binary, not a document with text.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        high = sum(1 for byte in sample if byte >= 0x80)
        if high > 0.3 * len(sample):
            raise Unreadable("unsupported_file", "The file's encoding is not known: save it as UTF-8.") from None
        return data.decode("cp1252", "replace")


def _joined(pieces: Iterator[str], max_chars: int) -> str:
    parts: list[str] = []
    size = 0
    for piece in pieces:
        parts.append(piece)
        size += len(piece)
        if size > max_chars:
            raise _too_long(max_chars)
    return "".join(parts)


def _too_long(max_chars: int) -> Unreadable:
    return Unreadable("invalid_file", f"The file has more than {max_chars:,} characters of text: split it.")


def _clean(text: str) -> str:
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "")
    return text.encode("utf-8", "replace").decode("utf-8")


def _pdf(path: Path) -> Iterator[str]:
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError

    protected = Unreadable("unsupported_file", "The PDF is protected: save it without a password.")
    try:
        reader = PdfReader(path)
        if reader.is_encrypted and not reader.decrypt(""):
            raise protected
        for page in reader.pages:
            yield page.extract_text().strip() + "\n\n"
    except (DependencyError, FileNotDecryptedError):
        raise protected from None
    except (PyPdfError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, OSError) as error:
        raise Unreadable("invalid_file", f"The PDF is damaged and cannot be read ({type(error).__name__}).") from error


def _docx(path: Path) -> Iterator[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if "word/document.xml" not in names:
                raise Unreadable("unsupported_file", "The file is an archive, and not a .docx: upload what is in it.")
            headings = _heading_styles(_part(archive, "word/styles.xml")) if "word/styles.xml" in names else {}
            yield from _paragraphs(_part(archive, "word/document.xml"), headings)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ElementTree.ParseError) as error:
        raise Unreadable(
            "invalid_file", f"The .docx is damaged and cannot be read ({type(error).__name__})."
        ) from error


def _part(archive: zipfile.ZipFile, name: str) -> IO[bytes]:
    info = archive.getinfo(name)
    if info.flag_bits & 1:
        raise Unreadable("unsupported_file", "The .docx is protected: save it without a password.")
    if info.file_size > _MAX_DOCX_PART_BYTES:
        raise Unreadable("invalid_file", f"The .docx unpacks to {info.file_size:,} bytes, which is more than is read.")
    return archive.open(info)


def _heading_styles(part: IO[bytes]) -> dict[str, int]:
    """Return the level of each heading style by its id: ids are translated, names are not."""
    levels: dict[str, int] = {}
    style = ""
    for event, element in ElementTree.iterparse(part, events=("start",)):
        assert event == "start"
        tag = _tag(element)
        if tag == "style":
            style = _attribute(element, "styleId")
        elif tag == "name" and style:
            name = _attribute(element, "val").lower()
            if match := re.fullmatch(r"heading ([1-6])", name):
                levels[style] = int(match[1])
            elif name == "title":
                levels[style] = 1
    return levels


def _paragraphs(part: IO[bytes], headings: dict[str, int]) -> Iterator[str]:
    run: list[str] = []
    cells: list[str] = []
    level = depth = 0
    bullet = False
    for event, element in ElementTree.iterparse(part, events=("start", "end")):
        tag = _tag(element)
        if event == "start":
            if tag == "p":
                run, level, bullet = [], 0, False
            elif tag == "pStyle":
                level = headings.get(_attribute(element, "val"), 0)
            elif tag == "numPr":
                bullet = True
            elif tag == "tbl":
                depth += 1
            continue
        if tag == "t":
            run.append(element.text or "")
        elif tag in ("tab", "br", "cr"):
            run.append("\t" if tag == "tab" else "\n")
        elif tag == "p":
            text = "".join(run).strip()
            element.clear()
            if depth:
                cells.append(text)
            elif text:
                yield f"{'#' * level} {text}\n\n" if level else f"- {text}\n" if bullet else f"{text}\n\n"
        elif tag == "tr":
            yield " | ".join(cell for cell in cells if cell) + "\n"
            cells = []
            element.clear()
        elif tag == "tbl":
            depth -= 1
            yield "\n"


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _attribute(element: ElementTree.Element, name: str) -> str:
    return next((value for key, value in element.attrib.items() if key.rpartition("}")[2] == name), "")


def html_text(html: str) -> str:
    """Return what a reader of the page would read, headings and lists as in Markdown."""
    page = _Page()
    page.feed(html)
    page.close()
    return page.text()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._hidden: list[str] = []
        self._pre = 0
        self._fresh = True  # at the start of a line

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _HIDDEN:
            self._hidden.append(tag)
        elif tag == "body":  # a head that was never closed
            self._hidden.clear()
        elif re.fullmatch("h[1-6]", tag):
            self._break(2, "#" * int(tag[1]) + " ")
        elif tag == "li":
            self._break(1, "- ")
        elif tag in ("br", "tr", "hr"):
            self._break(1)
        elif tag in ("td", "th") and not self._fresh:
            self._parts.append(" | ")
        elif tag in _BLOCKS:
            self._break(2)
        self._pre += tag == "pre"

    def handle_endtag(self, tag: str) -> None:
        if tag in self._hidden:
            while self._hidden.pop() != tag:
                pass
        elif re.fullmatch("h[1-6]", tag) or tag in _BLOCKS:
            self._break(2)
        self._pre = max(0, self._pre - (tag == "pre"))

    def handle_data(self, data: str) -> None:
        if self._hidden:
            return
        if not self._pre:
            data = re.sub(r"\s+", " ", data)
            data = data.lstrip() if self._fresh else data
        if data:
            self._parts.append(data)
            self._fresh = False

    def _break(self, lines: int, then: str = "") -> None:
        if not self._hidden:
            self._parts.append("\n" * lines + then)
            self._fresh = True

    def text(self) -> str:
        text = re.sub(r"[ \t]+\n", "\n", "".join(self._parts))
        return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
