"""Files into text: plain text, Markdown, HTML, PDF, DOCX. Runs in a child process (`child`), because it may blow up.

Nothing is fetched: links, images and external entities stay what they are. Headings come out as Markdown's, so that
chunking sees them.
"""

from __future__ import annotations

import codecs
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from deployments.retrieval.records import ErrorCode

_MAX_DOCX_PART_BYTES: Final = 32 * 2**20  # of XML
_LEAST_SHRINKING: Final = 4  # of XML, and of bombs; pictures and films hardly shrink, and are not looked at
_HEAD_BYTES: Final = 1024
_OLE_MAGIC: Final = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
_BOMS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_READ_AS: Final = {  # as browsers do
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "big5": "big5hkscs",
    "euc_kr": "cp949",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "shift_jis": "cp932",
}
_DECLARABLE: Final = re.compile(
    r"cp(125\d|866|874|932|949)|iso8859-\d+|koi8-[ru]|mac-(roman|cyrillic)|big5hkscs|euc_jp|gb18030"
)
_ASCII: Final = bytes(range(128))
_STRAY_AS: Final = {0xDC00 + byte: bytes([byte]).decode("cp1252", "replace") for byte in range(128, 256)}
"""What is read for a byte that "surrogateescape" has left."""
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

_HIDDEN: Final = ("script", "style", "noscript", "template", "svg", "head", "iframe", "object", "select")
_PLAIN: Final = ["a", "img", "b", "strong", "i", "em", "u"]  # of which the text is kept: it is to be found, not seen
_DOCX_STYLES: Final = "p[style-name='Title'] => h1:fresh"


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
        head = file.read(_HEAD_BYTES)
    if not head:
        raise Unreadable("invalid_file", "The file is empty.")
    suffix = Path(filename.lower()).suffix
    if b"%PDF-" in head or suffix == ".pdf":
        if b"%PDF-" not in head:
            raise Unreadable("invalid_file", "The file is named .pdf but is not a PDF.")
        text = _joined(_pdf(path), max_chars)
    elif head.startswith(b"PK\x03\x04") or suffix == ".docx":
        text = _docx(path)
        if len(text) > max_chars:
            raise _too_long(max_chars)
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
    """Return text bytes as text: by their mark, as UTF-8, as they say themselves, or as Latin of one byte a character.

    UTF-8 may have strays among its characters, as where files were joined or cut: they too are read as Latin.

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
        text = data.decode("utf-8", "surrogateescape")
    strays = len(data) - len(text.encode("utf-8", "ignore"))
    high = len(data.translate(None, _ASCII))
    others = len(text) - (len(data) - high) - strays
    if strays <= others:
        return text.translate(_STRAY_AS)
    if (declared := _declared(data)) is not None:
        return data.decode(declared, "replace")
    if high > 0.3 * len(data):
        raise Unreadable("unsupported_file", "The file's encoding is not known: save it as UTF-8.")
    return data.decode("cp1252", "replace")


def _declared(data: bytes) -> str | None:
    """Return the encoding that a page or an XML file names in its beginning, if it is one that browsers know."""
    from bs4.dammit import EncodingDetector

    label = EncodingDetector.find_declared_encoding(data[:_HEAD_BYTES], is_html=True)
    try:
        encoding = codecs.lookup(label or "").name
    except LookupError:
        return None
    encoding = _READ_AS.get(encoding, encoding)
    return encoding if _DECLARABLE.fullmatch(encoding) else None


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


def _docx(path: Path) -> str:
    import mammoth

    try:
        with zipfile.ZipFile(path) as archive:
            if "word/document.xml" not in archive.namelist():
                raise Unreadable("unsupported_file", "The file is an archive, and not a .docx: upload what is in it.")
            for part in archive.infolist():
                if part.flag_bits & 1:
                    raise Unreadable("unsupported_file", "The .docx is protected: save it without a password.")
                is_text = part.filename.endswith((".xml", ".rels")) or (
                    part.file_size > _LEAST_SHRINKING * part.compress_size  # any part can be named as the document
                )
                if is_text and part.file_size > _MAX_DOCX_PART_BYTES:
                    size = f"{part.file_size:,} bytes"
                    raise Unreadable("invalid_file", f"The .docx unpacks to {size}, which is more than is read.")
        with path.open("rb") as file:
            page = mammoth.convert_to_html(file, style_map=_DOCX_STYLES, convert_image=lambda _: [])
    except (Unreadable, MemoryError, RecursionError):
        raise
    except Exception as error:  # whatever a damaged archive or document makes of its readers
        raise Unreadable(
            "invalid_file", f"The .docx is damaged and cannot be read ({type(error).__name__})."
        ) from error
    return html_text(page.value)


def html_text(html: str) -> str:
    """Return what a reader of the page would read, headings, lists and tables as in Markdown.

    Raises:
        Unreadable: It is nested too deeply.
    """
    from bs4 import BeautifulSoup
    from markdownify import ATX, MarkdownConverter

    try:
        page = BeautifulSoup(html, "lxml")
        for hidden in page(_HIDDEN):
            hidden.decompose()
        convert = MarkdownConverter(
            heading_style=ATX,
            bullets="-",
            strip=_PLAIN,
            table_infer_header=True,
            escape_asterisks=False,
            escape_underscores=False,
            escape_misc=False,
        )
        return f"{convert.convert_soup(page).strip()}\n"
    except RecursionError:
        raise Unreadable("invalid_file", "The page is nested too deeply to be read.") from None
