"""Image files: one row each, those of a folder together; the answers are those of a table with their bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distilbeam.pipelines.prediction import rows as reading
from distilbeam.pipelines.prediction.opened_model import open_model
from distilbeam.pipelines.prediction.predict_files import PredictOptions, PredictSummary, predict_files
from distilbeam.student import load_student


def predict(student: Path, data: Path | list[Path], out: Path, **options: object) -> PredictSummary:
    places = [str(place) for place in (data if isinstance(data, list) else [data])]
    return predict_files(open_model(student)[1], places, out, PredictOptions(**options))  # type: ignore[arg-type]


def read(out: Path) -> dict[str, str | None]:
    """The prediction of each image, by its path."""
    table = pa.concat_tables(pq.read_table(path) for path in sorted(out.glob("*.parquet")))
    assert set(table["source_row"].to_pylist()) == {0}
    return dict(zip(table["source_file"].to_pylist(), table["prediction"].to_pylist(), strict=True))


@pytest.fixture
def images(tmp_path: Path) -> dict[str, int]:
    """Write images of one grey into three folders, in as many formats and sizes; return the grey of each by its path."""
    greys = {}
    for i, grey in enumerate(np.random.default_rng(0).permutation(256)[:30]):
        folder = tmp_path / "data" / f"folder {i % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{i:02d}.{('png', 'JPG', 'webp')[i % 3]}"
        Image.new("L", (8 + i, 9), int(grey)).save(path, lossless=True)
        greys[str(path)] = int(grey)
    (tmp_path / "data/labels.csv").write_text("path,label\n")  # what lies beside images in many folders
    (tmp_path / "data/folder 0/.hidden.png").write_text("x")
    return greys


@pytest.mark.parametrize("batch_rows", [1, 4, 1024])
def test_a_folder_of_images(image_student: Path, images: dict[str, int], tmp_path: Path, batch_rows: int) -> None:
    out = tmp_path / "out"
    summary = predict(image_student, tmp_path / "data", out, batch_rows=batch_rows, file_rows=7)
    assert (summary.files, summary.rows, summary.predicted, summary.without) == (30, 30, 30, 0)
    found = read(out)
    assert found == {path: "light" if grey > 127 else "dark" for path, grey in images.items()}
    table = pa.table({"image": [Path(path).read_bytes() for path in found]})
    assert load_student(image_student).predict(table)["prediction"].to_pylist() == list(found.values())
    again = predict(image_student, tmp_path / "data", out, batch_rows=batch_rows, file_rows=7)
    assert (again.rows, again.predicted, again.changed) == (30, 0, ())


def test_images_by_their_names(image_student: Path, images: dict[str, int], tmp_path: Path) -> None:
    one, *_ = images
    predict(image_student, Path(one), tmp_path / "one")
    assert list(read(tmp_path / "one")) == [one]
    predict(image_student, tmp_path / "data" / "*" / "*.png", tmp_path / "pattern")
    assert set(read(tmp_path / "pattern")) == {path for path in images if path.endswith(".png")}


def test_a_stopped_call_goes_on(
    image_student: Path, images: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    read_bytes = Path.read_bytes

    def counted(path: Path) -> bytes:
        if str(path) in images:
            if len(opened) == 13:
                raise KeyboardInterrupt
            opened.append(str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", counted)
    with pytest.raises(KeyboardInterrupt):
        predict(image_student, tmp_path / "data", tmp_path / "out", batch_rows=2, file_rows=2)
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    done = read(tmp_path / "out")
    assert len(done) == 12
    assert predict(image_student, tmp_path / "data", tmp_path / "out", batch_rows=2, file_rows=2).predicted == 18
    assert len(read(tmp_path / "out")) == 30


def test_a_changed_or_new_image_has_its_folder_predicted_again(
    image_student: Path, images: dict[str, int], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predict(image_student, tmp_path / "data", out)
    path, grey = next((path, grey) for path, grey in images.items() if "folder 1" in path)
    Image.new("L", (20, 20), 255 - grey).save(path)
    summary = predict(image_student, tmp_path / "data", out)
    assert (summary.predicted, summary.changed) == (10, (str(Path(path).parent),))
    assert read(out)[path] == ("dark" if grey > 127 else "light")
    Image.new("L", (8, 8), 200).save(tmp_path / "data/folder 2/new.png")
    assert predict(image_student, tmp_path / "data", out).predicted == 11
    assert read(out)[str(tmp_path / "data/folder 2/new.png")] == "light"


@pytest.mark.usefixtures("images")
def test_a_file_that_is_no_image_keeps_its_place_with_a_reason(image_student: Path, tmp_path: Path) -> None:
    broken = tmp_path / "data/folder 0/05.png"
    broken.write_bytes(b"no image")
    summary = predict(image_student, tmp_path / "data", tmp_path / "out")
    assert (summary.rows, summary.without) == (31, 1)
    assert summary.first is not None
    assert summary.first["source_file"] == str(broken)
    assert "must hold encoded images" in summary.first["reason"]
    assert read(tmp_path / "out")[str(broken)] is None


def test_the_bytes_of_a_batch_are_bounded(
    image_student: Path, images: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "IMAGES_BYTES", 1)
    assert predict(image_student, tmp_path / "data", tmp_path / "out").predicted == len(images)


def test_what_cannot_be_done_is_refused_in_a_sentence(
    student: Path, image_student: Path, images: dict[str, int], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="image files have no columns to carry along, got id; source_file says which"):
        predict(image_student, tmp_path / "data", tmp_path / "o1", columns=("id",))
    with pytest.raises(ValueError, match="image files cannot hold what the student reads, tensor input of column x"):
        predict(student, Path(next(iter(images))), tmp_path / "o2")
    with pytest.raises(ValueError, match=r"CSV cannot hold what the student reads, image input.*give Parquet or image"):
        predict(image_student, tmp_path / "data/labels.csv", tmp_path / "o3")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no file in it ends in \.parquet, \.pq, \.png, \.jpg"):
        predict(image_student, tmp_path / "empty", tmp_path / "o4")
