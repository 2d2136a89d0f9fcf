"""What the model's preprocessing is shown of every kind of image, and rows that stay with their names where some cannot
be read: files made on the spot, against Pillow and open_clip's own transform."""

import sys

import numpy as np
import pytest
import torch

from gapkern import embeddings
from gapkern.embeddings import Embeddings, pictures, sources
from tests import coded
from tests.ranks import together

Image = pytest.importorskip("PIL.Image")
open_clip = pytest.importorskip("open_clip")
pytest.importorskip("pyarrow")

SIZE = (40, 30)


def drawn(size=SIZE):
    """Colours that change smoothly, with a hard edge."""
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8))
    found = small.resize(size, Image.Resampling.BICUBIC)
    found.paste((255, 0, 0), (0, 0, size[0] // 3, size[1] // 3))
    return found


def veiled(mode):
    found = drawn().convert(mode)
    found.putalpha(Image.fromarray(np.linspace(0, 255, SIZE[0] * SIZE[1]).reshape(SIZE[::-1]).astype(np.uint8)))
    return found


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    drawn().save(path, exif=exif)


def animated(path, **options):
    drawn().save(path, save_all=True, append_images=[Image.new("RGB", SIZE, (0, 255, 0))], **options)


def keyed(path):
    """A palette one of whose colours is transparent."""
    drawn().convert("P").save(path, transparency=3)


# What makes each file, and whether open_clip's transform is the same on the image before it is converted.
MODES = {
    "bilevel.png": (lambda path: drawn().convert("1").save(path), False),
    "grey.png": (lambda path: drawn().convert("L").save(path), True),
    "grey.jpg": (lambda path: drawn().convert("L").save(path), True),
    "grey, veiled.png": (lambda path: veiled("LA").save(path), False),
    "palette.png": (lambda path: drawn().convert("P").save(path), False),
    "palette, keyed.png": (keyed, False),
    "palette.bmp": (lambda path: drawn().convert("P").save(path), False),
    "rgb.png": (lambda path: drawn().save(path), True),
    "rgb.webp": (lambda path: drawn().save(path, lossless=True), True),
    "rgba.png": (lambda path: veiled("RGBA").save(path), False),
    "rgba.webp": (lambda path: veiled("RGBA").save(path, lossless=True), False),
    "cmyk.jpg": (lambda path: drawn().convert("CMYK").save(path), False),
    "cmyk.tif": (lambda path: drawn().convert("CMYK").save(path), None),
    "ycbcr.jpg": (lambda path: drawn().save(path, quality=90), True),
    "lab.tif": (lambda path: Image.merge("LAB", drawn().split()).save(path), None),
    "turned.jpg": (turned, True),
    "turned.png": (turned, True),
    "animated.gif": (animated, False),
    "animated.webp": (lambda path: animated(path, lossless=True), True),
    "animated.png": (lambda path: animated(path), True),
    "pages.tif": (animated, True),
}


@pytest.fixture(scope="module")
def transform():
    return open_clip.image_transform(16, is_train=False)


@pytest.mark.parametrize("name", MODES)
def test_each_mode_is_open_clips_transform_of_the_rgb_image(name, transform, tmp_path):
    make, same = MODES[name]
    make(tmp_path / name)
    signature, shown = sources.images(tmp_path).signed(0)
    assert len(signature) == 64
    with Image.open(tmp_path / name) as opened:
        wanted = opened.convert("RGB")
        assert shown.mode == "RGB"
        assert shown.size == SIZE
        assert np.array_equal(np.asarray(shown), np.asarray(wanted))
        ours = transform(shown)
        assert torch.equal(ours, transform(wanted))
        if same is not None:
            opened.seek(0) if getattr(opened, "n_frames", 1) > 1 else None
            assert torch.equal(ours, transform(opened)) == same, "docs/formats.md says where they differ"


def test_sixteen_bits_are_shown_by_their_range(transform, tmp_path):
    """Pillow's conversion clips them at 255, so that open_clip's transform shows white."""
    greys = (np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE[::-1])).astype(np.uint16)
    Image.fromarray(greys).save(tmp_path / "x.png")
    shown = sources.images(tmp_path).signed(0)[1]
    eight = Image.fromarray(np.rint(greys / 257).astype(np.uint8)).convert("RGB")
    assert torch.equal(transform(shown), transform(eight))
    clipped = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"))
    assert (clipped == 255).mean() > 0.99


def test_a_cut_image_is_named(tmp_path):
    drawn().save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    for cut in (data[: len(data) // 2], data[:30], b"", b"GIF89a"):
        with pytest.raises(ValueError, match=r"^images: cannot read x\.png \("):
            pictures.decode(cut, "x.png")


BROKEN = (0, 5, 6, 7, 8, 16)


class Embedding:
    """`embed` of a folder with images that cannot be read, by rows of four on any number of ranks."""

    __name__ = "embedding"

    def __init__(self, place, out):
        self.place, self.out = place, out

    def __call__(self, rank, world):
        embeddings.embed(
            coded.model(),
            images=self.place / "pics",
            texts=sources.captions(self.place / "captions.csv"),
            out=self.out,
            batch_size=3,
            shard_rows=4,
            on_error="skip",
            timeout=60,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("skipped")
    for i in range(17):
        coded.picture(folder / "pics" / f"{i:02d}.png", i)
    for i in BROKEN:
        (folder / "pics" / f"{i:02d}.png").write_bytes(b"no picture")
    rows = [f"{i:02d}.png,a {i}" for i in reversed(range(17))]
    (folder / "captions.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    Embedding(folder, folder / "one")(0, 1)
    return folder


def everything(out):
    images, texts = Embeddings(out, "img_emb"), Embeddings(out, "text_emb")
    return {
        "images": coded.values(images[:]),
        "texts": coded.values(texts[:]),
        "metadata": [row["image_path"] for row in images.metadata()],
        "captions": [(row["caption"], row["image_key"]) for row in texts.metadata()],
        "image_of": np.load(out / "image_of.npy").tolist(),
        "skipped": images.manifest["skipped"],
        "shards": [(entry["name"], entry["sha256"]) for entry in images.manifest["shards"]],
    }


def aligned(found):
    there = [i for i in range(17) if i not in BROKEN]
    assert found["images"] == there
    assert found["metadata"] == [f"{i:02d}.png" for i in there]
    assert [int(caption.split()[1]) for caption, _ in found["captions"]] == found["texts"]
    assert [key for _, key in found["captions"]] == [f"{i:02d}.png" for i in found["texts"]]
    assert [there[i] for i in found["image_of"]] == found["texts"]
    assert sorted(found["texts"]) == there
    assert list(found["skipped"]) == [f"{i:02d}.png" for i in BROKEN]
    assert all("cannot read" in why for why in found["skipped"].values())


def test_what_is_skipped_is_listed_and_the_rest_stays_with_its_names(place):
    aligned(everything(place / "one"))


@pytest.mark.distributed
@pytest.mark.skipif(sys.platform != "linux", reason="gloo over the loopback interface")
def test_ranks_skip_what_one_skips(place, tmp_path):
    together(2, Embedding(place, tmp_path / "two"))
    assert everything(tmp_path / "two") == everything(place / "one")


def test_a_run_that_was_killed_goes_on_with_what_it_skipped(place, tmp_path, monkeypatch):
    """Killed in every shard in turn, before its file is there; no shard is encoded twice."""
    from gapkern.embeddings import writing

    kept, killed, encoded = writing.write_shard, set(), []

    class Killed(BaseException):
        pass

    def dying(folder, name, *rest):
        if (folder.name, name) not in killed:
            killed.add((folder.name, name))
            raise Killed
        return kept(folder, name, *rest)

    model = coded.model()
    whole = model.encode_images
    monkeypatch.setattr(type(model), "encode_images", lambda self, x, **k: encoded.append(len(x)) or whole(x, **k))
    monkeypatch.setattr(writing, "write_shard", dying)
    for _ in range(20):
        try:
            Embedding(place, tmp_path / "out")(0, 1)
            break
        except Killed:
            continue
    assert everything(tmp_path / "out") == everything(place / "one")
    assert len({name for kind, name in killed if kind == "img_emb"}) == 4  # the shard of rows 4 to 7 has one row left
    assert sum(encoded) == 2 * 11
