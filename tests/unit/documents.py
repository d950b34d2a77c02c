"""Small documents, made by hand: so that tests need no files, and no library to write them."""

from __future__ import annotations

import io
import zipfile


def pdf(pages: list[str]) -> bytes:
    """Return a PDF with one line of text on each page."""
    objects: list[bytes] = [b"<</Type/Catalog/Pages 2 0 R>>"]
    kids = " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
    objects.append(f"<</Type/Pages/Kids[{kids}]/Count {len(pages)}>>".encode())
    objects.append(b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>")
    for i, text in enumerate(pages):
        stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode("latin-1")
        resources = "/Resources<</Font<</F1 3 0 R>>>>"
        page = f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]{resources}/Contents {5 + 2 * i} 0 R>>"
        objects.append(page.encode())
        objects.append(b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream))
    out = bytearray(b"%PDF-1.4\n")
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj%s endobj\n" % (number, body)
    table = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer<</Size %d/Root 1 0 R>>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, table)
    return bytes(out)


_LIST_ITEM = '<w:numPr><w:ilvl w:val="0"/><w:numId w:val="1"/></w:numPr>'
_BULLETS = (
    '<w:abstractNum w:abstractNumId="0"><w:lvl w:ilvl="0"><w:numFmt w:val="bullet"/></w:lvl></w:abstractNum>'
    '<w:num w:numId="1"><w:abstractNumId w:val="0"/></w:num>'
)


def docx(paragraphs: list[tuple[str, str]], table: list[list[str]] | None = None) -> bytes:
    """Return a .docx of (style id, text) paragraphs; the style "list" makes a list item."""
    body = []
    for style, text in paragraphs:
        properties = _LIST_ITEM if style == "list" else f'<w:pStyle w:val="{style}"/>' if style else ""
        half = len(text) // 2
        runs = "".join(f'<w:r><w:t xml:space="preserve">{part}</w:t></w:r>' for part in (text[:half], text[half:]))
        body.append(f"<w:p><w:pPr>{properties}</w:pPr>{runs}</w:p>")
    for row in table or []:
        cells = "".join(f"<w:tc><w:p><w:r><w:t>{cell}</w:t></w:r></w:p></w:tc>" for cell in row)
        body.append(f"<w:tr>{cells}</w:tr>")
    if table:
        body[len(paragraphs) :] = ["<w:tbl>", *body[len(paragraphs) :], "</w:tbl>"]
    namespace = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
    styles = '<w:style w:type="paragraph" w:styleId="berschrift1"><w:name w:val="heading 1"/></w:style>'
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/styles.xml", f"<w:styles {namespace}>{styles}</w:styles>")
        archive.writestr("word/numbering.xml", f"<w:numbering {namespace}>{_BULLETS}</w:numbering>")
        archive.writestr("word/document.xml", f"<w:document {namespace}><w:body>{''.join(body)}</w:body></w:document>")
    return out.getvalue()


def zip_bomb(unpacked_bytes: int, part: str = "word/document.xml") -> bytes:
    """Return a .docx of a thousandth of what one of its parts unpacks to."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        if part != "word/document.xml":
            archive.writestr("word/document.xml", "")
        with archive.open(part, "w") as bomb:
            bomb.write(b"<w:document xmlns:w='w'><w:body><w:p><w:t>")
            for _ in range(unpacked_bytes >> 20):
                bomb.write(b" " * 2**20)
    return out.getvalue()
