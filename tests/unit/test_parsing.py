"""Files into text, and files that are not what they say."""

from __future__ import annotations

import random
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar

import pytest

from deployments.retrieval.parsing import Unreadable, html_text, text_of
from tests.unit.documents import docx, pdf, zip_bomb
from tests.unit.stub_server import http_server


def read(path: Path, data: bytes, name: str, max_chars: int = 100_000) -> str:
    file = path / "upload"
    file.write_bytes(data)
    return text_of(file, name, max_chars=max_chars)


def refusal(path: Path, data: bytes, name: str, max_chars: int = 100_000) -> Unreadable:
    with pytest.raises(Unreadable) as refused:
        read(path, data, name, max_chars)
    return refused.value


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain \xc3\xbc", "plain ü"),
        (b"\xef\xbb\xbfmarked", "marked"),
        ("sixteen ü".encode("utf-16"), "sixteen ü"),
        ("thirty-two ü".encode("utf-32"), "thirty-two ü"),
        (b"caf\xe9 in one byte a character", "café in one byte a character"),
        (b"one\r\ntwo\rthree", "one\ntwo\nthree"),
    ],
)
def test_text_is_read_whatever_its_encoding(tmp_path: Path, data: bytes, text: str) -> None:
    assert read(tmp_path, data, "a.txt") == text


@pytest.mark.parametrize("latin", ["\u2019", "é", "ü und ß"])
def test_utf8_with_strays_among_its_characters_is_read_as_utf8(tmp_path: Path, latin: str) -> None:
    text = "Größe und Maß, naïve café. "
    data = text.encode() + latin.encode("cp1252") + b". " + text.encode()
    assert read(tmp_path, data, "a.md") == f"{text}{latin}. {text}"


@pytest.mark.parametrize(
    ("label", "encoding", "words"),
    [
        ("windows-1251", "cp1251", "Привет, мир"),
        ("KOI8-R", "koi8-r", "Привет, мир"),
        ("Shift_JIS", "cp932", "①東京の天気"),
        ("gb2312", "gb18030", "北京的天气"),
        ("EUC-KR", "cp949", "서울의 날씨"),
        ("Big5", "big5", "台北的天氣"),
        ("iso-8859-2", "iso8859-2", "Zażółć gęślą jaźń"),
        ("latin1", "cp1252", "„Straße“ \u2013 schön"),
    ],
)
@pytest.mark.parametrize(
    "head", ['<meta charset="{}">', '<meta http-equiv="content-type" content="text/html; charset={}">']
)
def test_a_page_is_read_in_the_encoding_it_names(
    tmp_path: Path, head: str, label: str, encoding: str, words: str
) -> None:
    page = f"<html><head>{head.format(label)}<title>x</title></head><body><p>{words}</p></body></html>"
    assert read(tmp_path, page.encode(encoding), "a.html") == f"{words}\n"
    assert read(tmp_path, page.encode(), "a.html") == f"{words}\n", "a page that is UTF-8 whatever it says"


@pytest.mark.parametrize("label", ["utf-16", "utf-8", "hex", "unicode-escape", "nonsense", ""])
def test_an_encoding_that_no_page_can_be_in_is_not_believed(tmp_path: Path, label: str) -> None:
    page = f'<html><meta charset="{label}"><p>Straße</p></html>'
    assert read(tmp_path, page.encode("cp1252"), "a.html") == "Straße\n"


def test_an_xml_file_is_read_in_the_encoding_it_names(tmp_path: Path) -> None:
    text = '<?xml version="1.0" encoding="windows-1251"?>\n<b>Привет</b>'
    assert read(tmp_path, text.encode("cp1251"), "a.xml") == text


def test_markdown_stays_as_it_is(tmp_path: Path) -> None:
    assert read(tmp_path, b"# Head\n\n- one\n", "a.md") == "# Head\n\n- one\n"


def test_html_is_what_a_reader_reads(tmp_path: Path) -> None:
    page = b"""<!doctype html><html><head><title>T</title><style>p {x: y}</style></head><body>
      <h1>Fish &amp; chips</h1><p>One <b>bold</b>
      line.<script>alert("no")</script></p><ul><li>salt<li>vinegar</ul>
      <table><tr><th>a<th>b<tr><td>1<td>2</table><pre>x
  y</pre></body></html>"""
    text = read(tmp_path, page, "page.bin")
    assert text.startswith("# Fish & chips\n\nOne bold\nline.\n\n- salt\n- vinegar\n\n")
    assert "| a | b |\n| --- | --- |\n| 1 | 2 |" in text
    assert "alert" not in text
    assert "{" not in text


def test_broken_html_loses_no_text() -> None:
    assert html_text("<p>one<div><script>x</script>two</p></div></b><li>three <").split() == [
        "one",
        "two",
        "-",
        "three",
        "<",
    ]


def test_a_page_nested_without_end_is_refused() -> None:
    with pytest.raises(Unreadable, match="nested too deeply"):
        html_text("<div>" * 50_000 + "deep")


def test_pdf_text_is_read_page_by_page(tmp_path: Path) -> None:
    assert read(tmp_path, pdf(["First page.", "Second page."]), "a.pdf") == "First page.\n\nSecond page.\n\n"


def test_docx_headings_lists_and_tables_are_read_in_any_language(tmp_path: Path) -> None:
    data = docx([("berschrift1", "Titel"), ("", "Ein Absatz."), ("list", "Punkt")], [["a", "b"], ["1", "2"]])
    assert read(tmp_path, data, "a.docx") == (
        "# Titel\n\nEin Absatz.\n\n- Punkt\n\n| a | b |\n| --- | --- |\n| 1 | 2 |\n"
    )


def test_content_decides_over_the_name(tmp_path: Path) -> None:
    assert read(tmp_path, pdf(["Hello."]), "notes.txt") == "Hello.\n\n"


@pytest.mark.parametrize(
    ("data", "name", "code", "word"),
    [
        (b"", "a.txt", "invalid_file", "empty"),
        (b" \n ", "a.txt", "invalid_file", "no text"),
        (b"just text", "a.pdf", "invalid_file", "not a PDF"),
        (b"%PDF-1.7\nnothing more", "a.pdf", "invalid_file", "damaged"),
        (b"just text", "a.docx", "invalid_file", "damaged"),
        (b"PK\x03\x04 broken", "a.docx", "invalid_file", "damaged"),
        (random.Random(1).randbytes(5000), "a.txt", "unsupported_file", "binary"),
        (b"\x89PNG\r\n\x1a\n", "a.png", "unsupported_file", "PNG"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1....", "a.doc", "unsupported_file", "save it as .docx"),
        ("Это русский текст".encode("cp1251"), "a.txt", "unsupported_file", "UTF-8"),
        (pdf([""]), "scan.pdf", "invalid_file", "no text"),
        (b"x" * 200_000, "a.txt", "invalid_file", "100,000 characters"),
        (b"x" * 500_000, "a.txt", "invalid_file", "100,000 characters"),
        (pdf(["word " * 30_000]), "a.pdf", "invalid_file", "100,000 characters"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_reason(
    tmp_path: Path, data: bytes, name: str, code: str, word: str
) -> None:
    refused = refusal(tmp_path, data, name)
    assert refused.code == code
    assert word in refused.message


def test_an_archive_that_is_not_a_docx_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("xl/workbook.xml", "<x/>")
    assert refusal(tmp_path, (tmp_path / "a.zip").read_bytes(), "a.xlsx").code == "unsupported_file"


@pytest.mark.parametrize("part", ["word/document.xml", "word/media/film.mp4"])
def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, part: str) -> None:
    refused = refusal(tmp_path, zip_bomb(300 * 2**20, part), "bomb.docx")
    assert refused.code == "invalid_file"
    assert "unpacks to" in refused.message


def test_a_film_in_a_docx_may_be_as_long_as_it_likes(tmp_path: Path) -> None:
    file = tmp_path / "upload.docx"
    file.write_bytes(docx([("", "Look at this.")]))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("word/media/film.mp4", random.Random(1).randbytes(33 * 2**20))
    assert text_of(file, "a.docx", max_chars=100) == "Look at this.\n"


def test_an_entity_bomb_is_refused(tmp_path: Path) -> None:
    entities = "".join(f'<!ENTITY e{i} "{f"&e{i - 1};" * 10}">' for i in range(1, 12))
    body = f'<!DOCTYPE d [<!ENTITY e0 "{"x" * 100}">{entities}]><w:p xmlns:w="w"><w:t>&e11;</w:t></w:p>'
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as archive:
        archive.writestr("word/document.xml", body)
    assert refusal(tmp_path, (tmp_path / "a.docx").read_bytes(), "a.docx").code == "invalid_file"


class Fetched(BaseHTTPRequestHandler):
    """Notes what is asked for."""

    paths: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def elsewhere() -> Iterator[str]:
    with http_server(Fetched) as url:
        yield url
    Fetched.paths.clear()


def test_nothing_is_fetched_for_a_page(elsewhere: str, tmp_path: Path) -> None:
    page = f"""<html><head><link rel="stylesheet" href="{elsewhere}/css"><script src="{elsewhere}/js"></script></head>
      <body><img src="{elsewhere}/img" alt="a"><iframe src="{elsewhere}/frame"></iframe>Hello.</body></html>"""
    assert read(tmp_path, page.encode(), "a.html") == "Hello.\n"
    assert Fetched.paths == []


@pytest.mark.parametrize("entity", [False, True])
def test_nothing_is_fetched_for_a_docx(elsewhere: str, tmp_path: Path, entity: bool) -> None:
    office, drawing = (
        "http://schemas.openxmlformats.org/officeDocument/2006",
        "http://schemas.openxmlformats.org/drawingml",
    )
    declared = f'<!DOCTYPE d [<!ENTITY far SYSTEM "{elsewhere}/entity">]>' if entity else ""
    picture = '<pic:pic><pic:blipFill><a:blip r:link="rId5"/></pic:blipFill></pic:pic>'
    graphic = f"<wp:inline><a:graphic><a:graphicData>{picture}</a:graphicData></a:graphic></wp:inline>"
    text = "Hello.&far;" if entity else "Hello."
    body = f"""{declared}<w:document xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"
      xmlns:r="{office}/relationships" xmlns:a="{drawing}/2006/main" xmlns:pic="{drawing}/2006/picture"
      xmlns:wp="{drawing}/2006/wordprocessingDrawing"><w:body><w:p><w:r><w:t>{text}</w:t></w:r>
      <w:r><w:drawing>{graphic}</w:drawing></w:r></w:p></w:body></w:document>"""
    linked = f"""<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships"><Relationship
      Id="rId5" Type="{office}/relationships/image" TargetMode="External" Target="{elsewhere}/linked.png"/>
      </Relationships>"""
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as archive:
        archive.writestr("word/document.xml", body)
        archive.writestr("word/_rels/document.xml.rels", linked)
    assert read(tmp_path, (tmp_path / "a.docx").read_bytes(), "a.docx") == "Hello.\n"
    assert Fetched.paths == []
