"""Images and texts are read to their ends: every file, member and line is a row, or is named."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest

from gapkern import layout, models, prompts
from gapkern.cli import main
from gapkern.embeddings import Embeddings, pictures, sources, tars, verify
from tests import coded

PIL = pytest.importorskip("PIL.Image")
pytest.importorskip("pyarrow")


def png(value: int, suffix: str = "png") -> bytes:
    file = io.BytesIO()
    PIL.new("RGB", (3, 2), (value, 0, 0)).save(file, format=suffix)
    return file.getvalue()


def tar(path, members, **options):
    """A tar of (name, content); content None is a folder, a string a link."""
    with tarfile.open(path, "w", **options) as opened:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if content is None:
                member.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                member.type, member.linkname = tarfile.LNKTYPE, content
            else:
                member.size = len(content)
            opened.addfile(member, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def reds(source):
    return [source.read(i).getpixel((0, 0))[0] for i in range(len(source))]


def said(path):
    with layout.notes() as notes:
        found = sources.images(path)
    return found, " | ".join(notes)


FIVE = [(f"{i}.png", png(10 + i)) for i in range(5)]


def blocks(path):
    data = path.read_bytes()
    return [data[i : i + 512] for i in range(0, len(data), 512)]


HARMS = {
    "cut between members": lambda b: b[:4],
    "one block of zeros": lambda b: b[:11],
    "a header of zeros": lambda b: [*b[:4], bytes(512), *b[5:]],
    "a member of zeros": lambda b: [*b[:4], bytes(512), bytes(512), *b[6:]],
    "a damaged header": lambda b: [*b[:4], b[4][:100] + b"X" + b[4][101:], *b[5:]],
    "more behind the end": lambda b: b + b[:2],
    "bytes in the end": lambda b: [*b[:-1], bytes(511) + b"x"],
    "cut within a header": lambda b: [*b[:4], b[4][:100]],
    "cut within a member": lambda b: [*b[:5], b[5][:30]],
}


@pytest.mark.parametrize("case", HARMS)
@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_are_read_to_their_ends(tmp_path, case, kind):
    path = tar(tmp_path / "x.tar", FIVE, format=kind)
    assert reds(sources.images(path)) == [10, 11, 12, 13, 14]
    path.write_bytes(b"".join(HARMS[case](blocks(path))))
    with pytest.raises(ValueError, match=r"images: expected .*tar, got .*x\.tar") as raised:
        sources.images(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names(tmp_path, kind):
    members = [("./" + "d" * 90 + "/" + "n" * 90 + ".png", png(1)), ("ünï/ß.png", png(2)), ("up.JPG", png(3, "jpeg"))]
    source = sources.images(tar(tmp_path / "x.tar", members, format=kind))
    assert len(source) == 3
    assert source.names[1] == "x.tar/ünï/ß.png"
    assert reds(source)[:2] == [1, 2]


def test_members_that_were_dropped(tmp_path):
    """Names with dots, names given twice, links, folders, suffixes: rows, or counted."""
    members = [
        ("a", None),
        ("a/b.c.png", png(1)),
        ("a/b.d.png", png(2)),
        ("a/b.d.txt", b"two"),
        ("7.png", png(3)),
        ("7.cls", b"1"),
        ("7.png", png(4)),
        ("7.cls", b"5"),
        ("8.jpe", png(5, "jpeg")),
        ("link.png", "7.png"),
        ("9.seg.png", png(6)),
        ("9.txt", b"\xef\xbb\xbfnine"),
        ("x.heic", b"?"),
        ("y.json", b"{}"),
        ("z.txt", b"z"),
        ("._7.png", b"?"),
    ]
    source, notes = said(tar(tmp_path / "x.tar", members))
    assert reds(source)[:4] == [1, 2, 3, 4]
    assert reds(source)[5:] == [4, 6], "a link leads to what the name means last"
    assert source.names[2:4] == ["x.tar/7.png", "x.tar/7.png#2"]
    assert [source.captions[i] for i in (1, 6)] == ["two", "nine"]
    assert "1 .heic, 1 .json, 1 .txt" in notes
    assert "2 of 7 have a number in .cls: none is a label" in notes
    with pytest.raises(ValueError, match=r"images: expected one image of 1 in .*, got \.png, \.jpg"):
        sources.images(tar(tmp_path / "y.tar", [("1.png", png(1)), ("1.jpg", png(1, "jpeg"))]))
    with pytest.raises(ValueError, match=r"images: expected images .* got 1 \.txt"):
        sources.images(tar(tmp_path / "z.tar", [("1.txt", b"1")]))


def test_shards_share_names(tmp_path):
    """The same key in two tars is two samples; tars of one name in two folders are told apart."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        tar(tmp_path / folder / "0.tar", [("1.png", png(ord(folder))), ("1.cls", b"1")])
    source = sources.images([tmp_path / "a" / "0.tar", tmp_path / "b" / "0.tar"])
    assert (list(source.names), source.labels) == (["a/0.tar/1.png", "b/0.tar/1.png"], [1, 1])
    assert reds(source) == [97, 98]
    tar(tmp_path / "a" / "1.tar", [("2.png", png(5))])
    tar(tmp_path / "b" / "1.tar", [("2.txt", b"in another shard"), ("3.png", png(6))])
    tar(tmp_path / "a" / "10.tar", [("4.png", png(7))])
    assert reds(sources.images(tmp_path / "a")) == [97, 5, 7]
    source, notes = said(tmp_path / "b")
    assert (reds(source), source.captions) == ([98, 6], None)
    assert "1 .txt" in notes
    with pytest.raises(ValueError, match="images: expected each tar once"):
        sources.images([tmp_path / "a" / "0.tar", tmp_path / "a" / "0.tar"])


def test_compressed_tars_are_refused(tmp_path):
    import gzip

    path = tar(tmp_path / "x.tar", FIVE)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"images: expected a folder or an uncompressed \.tar"):
        sources.images(tmp_path / "x.tar.gz")
    source, notes = said(tmp_path)
    assert len(source) == 5
    assert "1 .gz" in notes
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"images: expected a folder or an uncompressed \.tar"):
        sources.images(path)


def test_a_tar_beside_images_is_used(tmp_path):
    coded.picture(tmp_path / "a.png", 1)
    tar(tmp_path / "x.tar", FIVE)
    source, notes = said(tmp_path)
    assert reds(source) == [1, 10, 11, 12, 13, 14]
    assert list(source.names[:2]) == ["a.png", "x.tar/0.png"]
    assert "1 files and 5 images in 1 tars" in notes
    tar(tmp_path / "x.tar", [("notes.txt", b"no image")])
    source, notes = said(tmp_path)
    assert reds(source) == [1]
    assert "1 .tar without images, such as x.tar" in notes


def test_folders_with_everything(tmp_path):
    from PIL import features

    made = 0
    for i, suffix in enumerate(sorted(set(pictures.SUFFIXES) - {".pbm", ".pgm"})):
        if suffix == ".avif" and not features.check("avif"):
            continue
        coded.picture(tmp_path / "pics" / f"{i}{suffix.upper()}", 200)
        made += 1
    for name in ("x.heic", "y.svg", "y2.svg", "notes"):
        (tmp_path / "pics" / name).write_bytes(b"?")
    source, notes = said(tmp_path / "pics")
    assert len(source) == made
    assert all(abs(red - 200) < 12 for red in reds(source))
    assert "1 .heic, 2 .svg, 1 no suffix" in notes
    coded.picture(tmp_path / "odd" / "a\nb.png", 3)
    assert reds(sources.images(tmp_path / "odd")) == [3]


def test_links(tmp_path):
    coded.picture(tmp_path / "pics" / "a" / "1.png", 1)
    coded.picture(tmp_path / "pics" / "b" / "2.png", 2)
    (tmp_path / "pics" / "a" / "loop").symlink_to(tmp_path / "pics")
    (tmp_path / "pics" / "b" / "loop").symlink_to("../a")
    coded.picture(tmp_path / "elsewhere" / "3.png", 3)
    (tmp_path / "pics" / "c").symlink_to(tmp_path / "elsewhere")
    source, notes = said(tmp_path / "pics")
    assert (list(source.names), source.classes) == (["a/1.png", "b/2.png", "c/3.png"], ["a", "b", "c"])
    assert reds(source) == [1, 2, 3]
    assert "the link a/loop left aside" in notes
    (tmp_path / "pics" / "a" / "0.png").symlink_to("gone.png")
    with pytest.raises(ValueError, match=r"images: cannot read a/0\.png \(No such file"):
        sources.images(tmp_path / "pics").read(0)


GREYS = np.array([[0, 257, 32768], [40000, 65534, 65535]], dtype=np.uint16)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm", "x.jp2"])
def test_sixteen_bits_are_scaled(tmp_path, name):
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5 3 2 65535\n" + GREYS.byteswap().tobytes())
    else:
        PIL.fromarray(GREYS).save(tmp_path / name)
    found = np.asarray(sources.images(tmp_path).read(0))
    assert np.array_equal(found, np.rint(GREYS / 257).astype(np.uint8)[..., None].repeat(3, 2))


def test_unknown_ranges_are_refused(tmp_path):
    for dtype, kind in ((np.float32, "32-bit floats"), (np.int32, "32-bit integers")):
        PIL.fromarray(np.ones((2, 3), dtype)).save(tmp_path / "x.tif")
        with pytest.raises(ValueError, match=rf"cannot read x\.tif \(expected 8 or 16 bits a channel, got {kind}"):
            sources.images(tmp_path).read(0)


def test_orientation_is_left_as_open_clip_leaves_it(tmp_path):
    picture = PIL.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3))
    exif = PIL.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(np.asarray(sources.images(tmp_path).read(0)), np.asarray(picture))


def test_lines_end_with_line_feeds_alone(tmp_path):
    odd = [f"a{mark}b" for mark in "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"]
    for end in ("\n", "\r\n"):
        (tmp_path / "t.txt").write_bytes(("\ufeff" + end.join([*odd, "", "last"]) + end + end).encode())
        assert sources.texts(tmp_path / "t.txt").texts == [*odd, "", "last"]
        (tmp_path / "n.txt").write_bytes(("\ufeff" + end.join(odd) + end + end).encode())
        assert prompts.load_classnames(tmp_path / "n.txt") == odd
        (tmp_path / "p.txt").write_bytes(("\ufeff" + end.join(f"{{c}}{text}" for text in odd) + end).encode())
        assert prompts.load_templates(tmp_path / "p.txt", "") == [f"{{c}}{text}" for text in odd]
    (tmp_path / "t.txt").write_bytes(b"a\xff\n")
    with pytest.raises(ValueError, match="texts: expected text in UTF-8 in"):
        sources.texts(tmp_path / "t.txt")
    (tmp_path / "n.txt").write_text("a\n\nb\n")
    with pytest.raises(ValueError, match=r"classnames: expected no blank line within .*, got one in line 2"):
        prompts.load_classnames(tmp_path / "n.txt")
    for path, content in (("c.json", {"a": ["x", "y"]}), ("m.json", {"x": "the x", "y": "the y"})):
        (tmp_path / path).write_text(json.dumps(content), encoding="utf-8-sig")
    assert prompts.load_classnames(tmp_path / "c.json") == ["x", "y"]
    assert prompts.load_classnames(tmp_path / "m.json") == {"x": "the x", "y": "the y"}


@pytest.fixture
def coded_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models, "load", coded.model)
    monkeypatch.chdir(tmp_path)

    def run(*line):
        status = main(
            [
                "embed",
                "--model",
                "coded",
                "--out",
                "out",
                "--num_workers",
                "0",
                "--shard_rows",
                "4",
                "--batch_size",
                "2",
                "--json",
                *line,
            ]
        )
        captured = capsys.readouterr()
        return status, json.loads(captured.out) if status == 0 else captured.err, captured.err

    for i in range(18):
        coded.picture(tmp_path / "pics" / f"{i}.png", i)
    (tmp_path / "captions.json").write_text(json.dumps({f"{i}.png": f"a {i}" for i in range(17, -1, -1)}))
    return run


def places():
    return coded.values(Embeddings("out", "img_emb")[:])


def test_unreadable_images_stop_or_are_skipped(coded_run, tmp_path):
    (tmp_path / "pics" / "5.png").write_bytes(b"no picture")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    for i in range(8, 12):
        (tmp_path / "pics" / f"{i}.png").unlink()
        (tmp_path / "pics" / f"{i}.png").symlink_to("gone")
    line = ["--images", "pics", "--captions", "captions.json"]
    status, err, _ = coded_run(*line)
    assert (status, err.count("\n")) == (2, 1)
    assert "images: cannot read 5.png (cannot identify image file its bytes)" in err
    status, found, _ = coded_run(*line, "--on-error", "skip")
    assert (status, list(found["skipped"])) == (0, ["5.png", *(f"{i}.png" for i in range(8, 12))])
    there = [i for i in range(18) if i not in (5, 8, 9, 10, 11)]
    assert places() == there
    texts, image_of = coded.values(Embeddings("out", "text_emb")[:]), np.load("out/image_of.npy")
    assert sorted(texts) == there
    assert [there[i] for i in image_of] == texts
    assert Embeddings("out", "img_emb").keys() == [f"{i}.png" for i in there]
    assert verify("out")["img_emb"]["rows"] == 13
    assert coded_run(*line)[0] == 2, "what was skipped is no row of a run that stops"
    # Repaired: their shards alone are done again.
    coded.picture(tmp_path / "pics" / "5.png", 5)
    status, found, _ = coded_run(*line, "--on-error", "skip")
    assert (found["computed"]["img_emb"], list(found["skipped"])) == (4, [f"{i}.png" for i in range(8, 12)])
    for i in range(18):
        (tmp_path / "pics" / f"{i}.png").unlink()
        (tmp_path / "pics" / f"{i}.png").write_bytes(b"?")
    status, err, _ = coded_run("--images", "pics", "--on_error", "skip", "--no_resume")
    assert (status, "images: expected one that can be read, got 18 that cannot" in err) == (2, True)


@pytest.mark.parametrize(
    ("change", "again", "expected"),
    [
        (lambda p: coded.picture(p / "5.png", 55), 4, [0, 1, 2, 3, 4, 55, *range(6, 18)]),
        (lambda p: (p / "5.png").unlink(), 3, [i for i in range(18) if i != 5]),
        (lambda p: (p / "4.png").unlink(), 3, [i for i in range(18) if i != 4]),
        (lambda p: (p / "7.png").unlink(), 3, [i for i in range(18) if i != 7]),
        (lambda p: [(p / f"{i}.png").unlink() for i in (3, 4)], 6, [i for i in range(18) if i not in (3, 4)]),
        (lambda p: [(p / f"{i}.png").unlink() for i in range(4, 8)], None, [0, 1, 2, 3, *range(8, 18)]),
        (lambda p: [coded.picture(p / f"{i}.png", i) for i in range(18, 25)], 9, list(range(25))),
        (lambda p: coded.picture(p / "5b.png", 50), 5, [*range(6), 50, *range(6, 18)]),
        (lambda p: (p / "17.png").unlink(), 1, list(range(17))),
    ],
)
def test_a_change_voids_its_shards_and_no_others(coded_run, tmp_path, change, again, expected):
    assert coded_run("--images", "pics")[1]["computed"] == {"img_emb": 18}
    before = {p.name: p.stat() for p in (tmp_path / "pics").iterdir()}
    change(tmp_path / "pics")
    for p in (tmp_path / "pics").iterdir():
        if p.name in before:
            os.utime(p, ns=(before[p.name].st_atime_ns, before[p.name].st_mtime_ns))
    status, found, err = coded_run("--images", "pics")
    assert status == 0, err
    assert places() == expected
    assert Embeddings("out", "img_emb").keys() is not None
    assert verify("out")
    if again is not None:
        assert found["computed"] == {"img_emb": again}
    assert coded_run("--images", "pics")[1]["computed"] == {"img_emb": 0}


def test_other_sources_are_refused(coded_run, tmp_path):
    (tmp_path / "words.txt").write_text("\n".join(map(str, range(9))))
    assert coded_run("--images", "pics", "--texts", "words.txt")[0] == 0
    coded.picture(tmp_path / "others" / "x.png", 3)
    status, err, _ = coded_run("--images", "others")
    assert (status, "other images there than now" in err) == (2, True)
    (tmp_path / "others.txt").write_text("x\ny\n")
    status, err, _ = coded_run("--texts", "others.txt")
    assert (status, "other texts there than now" in err) == (2, True)
    assert places() == list(range(18))
    (tmp_path / "words.txt").write_text("\n".join(map(str, [0, 1, 2, 3, 44, *range(5, 9)])))
    assert coded_run("--texts", "words.txt")[1]["computed"] == {"text_emb": 4}


def test_an_unfinished_folder_is_not_read(coded_run, tmp_path):
    coded_run("--images", "pics")
    (tmp_path / "out/img_emb/manifest.json").unlink()
    (tmp_path / "out/img_emb/.progress").mkdir()
    with pytest.raises(ValueError, match="whose embed has not ended: run it again"):
        Embeddings("out", "img_emb")


def test_numbers_of_cls():
    assert [tars.number(text) for text in ("3", " 12\n", "-1", "1.0", "", None, "٣")] == [3, 12, *[None] * 5]
