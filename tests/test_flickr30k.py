"""Flickr30k Entities to tables: captions with boxes from both parts, and what is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from PIL import Image

from data.flickr30k import Span, convert, main, parse_sentence
from pixelllm.tables import Table

HEIGHT, WIDTH = 40, 60
SENTENCES = (
    "[/EN#1/people Two young , White males] play [/EN#0/notvisual each other] near "
    "[/EN#8/scene the yard] .\n"
    "[/EN#6/people/clothing A man 's hat] is on [/EN#1/people them]\n"
    "Nothing to see .\n"
)
# Chain 1 has two objects, one of them also of chain 6; chain 8 is the whole scene.
OBJECTS = """
  <object><name>1</name><bndbox><xmin>1</xmin><ymin>11</ymin><xmax>30</xmax><ymax>40</ymax></bndbox></object>
  <object><name>1</name><name>6</name>
    <bndbox><xmin>31</xmin><ymin>1</ymin><xmax>60</xmax><ymax>20</ymax></bndbox></object>
  <object><name>8</name><scene>1</scene><nobndbox>1</nobndbox></object>
"""  # noqa: E501
LEFT, RIGHT = (0.0, 0.25, 0.5, 1.0), (0.5, 0.0, 1.0, 0.5)


def annotation(name: str, objects: str = OBJECTS, width: int = WIDTH) -> str:
    size = f"<width>{width}</width><height>{HEIGHT}</height><depth>3</depth>"
    return f"<annotation><filename>{name}.jpg</filename><size>{size}</size>{objects}</annotation>\n"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("1000092795", "36979"):
        path = tmp_path / "flickr30k-images" / f"{name}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (WIDTH, HEIGHT)).save(path)
    return path.parent


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The folder: two images, the second with one caption."""
    folder = tmp_path / "entities"
    for part in ("Sentences", "Annotations"):
        (folder / part).mkdir(parents=True)
    for name, sentences in (("1000092795", SENTENCES), ("36979", "[/EN#1/people Boys] run .\n")):
        (folder / "Sentences" / f"{name}.txt").write_text(sentences)
        (folder / "Annotations" / f"{name}.xml").write_text(annotation(name))
    return folder


def zipped(folder: Path) -> Path:
    file = folder.with_name("annotations.zip")
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*.*")):
            archive.write(path, path.relative_to(folder))
    return file


def test_phrases_of_a_caption_are_found_where_the_text_has_them():
    line = "A [/EN#1/other/people dog 's red ball] [ sic ] do n't [/EN#2/other fly] ."
    text, spans = parse_sentence(line, "here")
    assert text == "A dog's red ball [ sic ] don't fly."
    assert spans == [Span(2, 16, "1"), Span(31, 34, "2")]
    assert [text[start:end] for start, end, _ in spans] == ["dog's red ball", "fly"]
    assert parse_sentence("[/EN#1/other ] [/EN#2/other a ]", "here") == ("a", [Span(0, 1, "2")])


@pytest.mark.parametrize("archive", [False, True])
def test_captions_get_the_boxes_of_their_chains(
    tmp_path: Path, corpus: Path, images: Path, archive: bool
):
    report = convert(zipped(corpus) if archive else corpus, images, tmp_path / "table")
    first, second = Table(tmp_path / "table")
    assert (first.id, first.size) == ("flickr30k-images/1000092795", (HEIGHT, WIDTH))
    assert first.path == str(images / "1000092795.jpg")
    one, other = first.phrases
    assert (one.task, one.id) == ("grounded", "grounded/1000092795/1")
    assert one.caption == "Two young, White males play each other near the yard."
    assert [(p.start, p.end, p.box) for p in one.pieces] == [(0, 22, LEFT), (0, 22, RIGHT)]
    assert one.pieces[0].center == (0.25, 0.625)
    found = [(other.caption[p.start : p.end], p.box) for p in other.pieces]
    assert other.caption == "A man's hat is on them"
    assert found == [("A man's hat", RIGHT), ("them", LEFT), ("them", RIGHT)]
    assert [phrase.caption for phrase in second.phrases] == ["Boys run."]
    assert report["dropped"] == {"caption without boxes": 1}
    assert (report["kept"], report["phrases"], report["split"]) == (2, 3, None)


def test_a_split_is_a_list_of_images(tmp_path: Path, corpus: Path, images: Path):
    split = tmp_path / "test.txt"
    split.write_text("36979\n")
    report = convert(corpus, images, tmp_path / "table", split)
    (record,) = Table(tmp_path / "table")
    assert record.id == "flickr30k-images/36979" and report["split"] == "test.txt"
    split.write_text("36979\n7\n")
    with pytest.raises(ValueError, match="test.txt:2: there is no Sentences/7.txt"):
        convert(corpus, images, tmp_path / "table", split)
    with pytest.raises(FileNotFoundError, match="--split .*no.txt: no such file"):
        convert(corpus, images, tmp_path / "table", tmp_path / "no.txt")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("Sentences/36979.txt", "a\n[/EN#1/people men", "36979.txt:2: .*chain 1 has no closing ]"),
        ("Sentences/36979.txt", "[/EN#1/a x [/EN#2/b y]", "36979.txt:1: .*inside the phrase"),
        ("Annotations/36979.xml", "<annotation>\n<size>", "36979.xml: not an XML file .*line 2"),
        ("Annotations/36979.xml", "<annotation/>", "36979.xml: no size of the image"),
        (
            "Annotations/36979.xml",
            annotation("36979", "<object><bndbox/></object>"),
            "36979.xml: object 1 has no name",
        ),
        (
            "Annotations/36979.xml",
            annotation("36979", OBJECTS.replace("<xmin>31", "<xmin>x")),
            "36979.xml: object 2: xmin is not a number but 'x'",
        ),
        (
            "Annotations/36979.xml",
            annotation("36979", width=61),
            r"36979.xml: .*has \(H, W\) \(40, 60\), but the annotations say \(40, 61\)",
        ),
    ],
)
def test_bad_files_are_named(
    tmp_path: Path, corpus: Path, images: Path, file: str, content: str, message: str
):
    (corpus / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        convert(corpus, images, tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_text_of_another_coding_is_named(tmp_path: Path, corpus: Path, images: Path):
    (corpus / "Sentences/36979.txt").write_bytes(b"caf\xe9 .")
    with pytest.raises(ValueError, match="36979.txt: not a text in UTF-8"):
        convert(corpus, images, tmp_path / "table")


def test_missing_and_damaged_files_are_named(tmp_path: Path, corpus: Path, images: Path):
    archive = zipped(corpus)
    content = archive.read_bytes()
    archive.write_bytes(content.replace(b"Boys", b"Bays"))
    with pytest.raises(ValueError, match=r"annotations.zip/Sentences/36979.txt: damaged in its"):
        convert(archive, images, tmp_path / "table")
    archive.write_bytes(content[:-30])
    with pytest.raises(ValueError, match="annotations.zip: neither a folder nor a whole zip"):
        convert(archive, images, tmp_path / "table")
    (corpus / "Annotations/36979.xml").unlink()
    with pytest.raises(FileNotFoundError, match="36979.xml: no such annotation file"):
        convert(corpus, images, tmp_path / "table")
    (images / "1000092795.jpg").unlink()
    with pytest.raises(FileNotFoundError, match="no file .*1000092795.jpg.*--skip-missing"):
        convert(corpus, images, tmp_path / "table")
    with pytest.raises(SystemExit, match="^error: .*no Sentences and Annotations"):
        main(images, images, tmp_path / "table")
    assert not (tmp_path / "table").exists()


def test_images_that_are_missing_can_be_skipped(tmp_path: Path, corpus: Path, images: Path):
    (images / "36979.jpg").unlink()
    report = convert(corpus, images, tmp_path / "table", skip_missing=True)
    assert report["dropped"] == {"caption without boxes": 1, "missing image": 1}
