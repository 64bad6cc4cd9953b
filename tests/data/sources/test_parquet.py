"""Parquet files written by pyarrow: the requested columns, in order; damage is a one-line error."""

import base64
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet as pq

from anarchobot.config.errors import UserError
from anarchobot.config.schema import DataConfig
from anarchobot.data.sources import compressed, parquet
from tests.data.sources.reading import problem, read

SCORED = DataConfig(text_field="content", score_field="score", score_min=0.5)


def write(path: Path, columns: dict[str, Any], **settings: Any) -> Path:
    pq.write_table(pa.table(columns), path, **settings)
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_rows_are_in_order_across_row_groups(tmp_path: Path, kind: pa.DataType) -> None:
    texts = [f"größe {i}\n" for i in range(1000)]
    path = write(tmp_path / "a.parquet", {"other": [[i] for i in range(1000)], "text": pa.array(texts).cast(kind)},
                 row_group_size=300)  # fmt: skip
    assert read(path)[0] == texts


def test_scores_and_broken_rows_are_counted(tmp_path: Path) -> None:
    columns = {"score": [0.4, 0.5, None, 1.0, 1.0, 1.0], "content": ["a", "b", "c", None, " ", "b"]}
    texts, counts = read(write(tmp_path / "a.parquet", columns), data=SCORED)
    assert texts == ["b"]
    assert counts.as_manifest() == {"read": 6, "kept": 1, "duplicates": 1, "filtered": 2, "broken": 2}
    assert counts.first_broken == f"{tmp_path / 'a.parquet'}: row 2: no number in 'score'"


def test_text_that_is_not_utf8_is_a_broken_row(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"caf\xe9", b"good too"])
    path = write(tmp_path / "a.parquet", {"text": pa.Array.from_buffers(pa.string(), 3, raw.buffers())})
    texts, counts = read(path)
    assert texts == ["good", "good too"]
    assert counts.first_broken == f"{path}: row 1: not UTF-8 (byte 4 of the text)"


def test_a_column_of_bytes_is_decoded_where_it_is_utf8(tmp_path: Path) -> None:
    """Spark and Hive write text without the UTF8 mark."""
    raw = pa.array(["größe".encode(), b"caf\xe9", None], pa.binary())
    path = write(tmp_path / "a.parquet", {"text": raw})
    texts, counts = read(path)
    assert texts == ["größe"] and counts.broken == 2
    assert counts.first_broken == f"{path}: row 1: 'text' has bytes that aren't UTF-8 (byte 4)"


def test_only_requested_columns_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"content": ["a"], "score": [1], "other": [2]})
    assert list(parquet.read_text_rows(path, SCORED)) == [(f"{path}: row 0", {"content": "a", "score": 1})]
    assert list(parquet.read_text_rows(path, DataConfig(text_field="content"))) == [
        (f"{path}: row 0", {"content": "a"})
    ]


def test_missing_column_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"content": ["a"], "n": [1]})
    assert problem(path) == f"{path}: no field 'text' (it has content, n): set data.text_field"
    assert "no field 'score' (it has content, n): set data.score_field" in problem(path, data=SCORED)
    assert problem(write(path, {"text": pa.array([], pa.string())})) == f"{path}: the file is empty"


def test_damage_is_a_one_line_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": [f"{i} some text" for i in range(5000)]}, row_group_size=1000)
    whole = path.read_bytes()
    in_the_middle = whole[: len(whole) // 2] + b"\0" * 2000 + whole[len(whole) // 2 + 2000 :]
    for damaged in (b"", b"PAR1", b"text" * 100, whole[:-1], whole[: len(whole) // 2], in_the_middle):
        path.write_bytes(damaged)
        assert problem(path).startswith(f"{path}: damaged or not a Parquet file (row ")


def test_memory_is_one_row_group(tmp_path: Path) -> None:
    """12 MB of text in groups of 0.6 MB, by Arrow's own memory counter."""
    texts = [f"{i:06d}" * 200 for i in range(10_000)]
    path = write(tmp_path / "a.parquet", {"text": texts}, row_group_size=500, compression="none", use_dictionary=False)
    before = peak = pa.total_allocated_bytes()
    for _ in parquet.read_text_rows(path, DataConfig()):
        peak = max(peak, pa.total_allocated_bytes())
    assert path.stat().st_size > 10e6 and peak - before < 3e6


def test_a_row_group_that_expands_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 MB of text in each of 3 groups are read; 6 MB in a later one, of a file of 2 kB, are not."""
    monkeypatch.setattr(compressed, "SMALL", 3_000_000)  # a tenth, for speed
    columns = {"text": ["x" * 2_000_000] * 3, "id": [1, 2, 3]}
    settings = {"compression": "zstd", "use_dictionary": False}
    path = write(tmp_path / "a.parquet", columns, row_group_size=1, **settings)
    assert [len(row["text"]) for _, row in parquet.read_rows(path)] == [2_000_000] * 3  # type: ignore[index]
    table = pa.table(columns)
    with pq.ParquetWriter(path, table.schema, **settings) as writer:
        writer.write_table(table[:1])
        writer.write_table(table)
    before = pa.total_allocated_bytes()
    with pytest.raises(UserError, match=r"a.parquet: row group 1 expands to more than 3,000,000 bytes"):
        next(parquet.read_rows(path))
    assert pa.total_allocated_bytes() - before < 100_000


def test_column_names_that_are_not_utf8_are_damage(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["a"], "other": ["b"]}, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"other", b"oth\xff\xfe"))
    assert problem(path).startswith(f"{path}: damaged or not a Parquet file (row 0: ")


# From make fuzz: the statistics of a column are damaged. pyarrow 26 ends the process when they are looked at.
DAMAGED_STATISTICS = (
    "c-oy)!EVz)5ZyQ{H;Hmck=C*$OZY%74rypBrBYFf7)Q_mX^A71HoZCSHjU)Osn=~<zK2iX12}W!gnHx$_yuOyiKBu95-WLTcW2(b"
    "eY@ix^tTyhFPPV5IwOw=d3>uALd2a&`Gn%^TJWTdJ`iFo(qNi0!W{Ob&MK^i5CC`wFb8i0uK`BT9)TR52XH7SZGbmwW91<Wd2_Yq"
    "&M+DCi$)1KI%6lj<O!E2=<q0t8xP5JdzU;dEwjvW4qjhJM6IQvEgI5Rs8&4J7`37%F?A7M@=3rn($vh-gbNXjxL_L7yDiLZQj<og"
    "O~#42#v?xAD3cOa-Ox;$#1Y>hT^lpi##$IpQ%qRw8Pu|^x=U<UwVFh)S)H6gRbAFob(m&UjIRabTfx0>OHvJ$_iL8(+eIZ-9bbgt"
    "Y0%WrwTzdROLgl5k;3r%H`(%xitoN){3y6zH21#nm;3vZ_3cAe<5SU~ZprvuB$jPfq2GUh@;tj)^Sky;4fXgwWaB^j;#F>V56j68"
    "@#n{Kt&+0RD)m6EWl=9ZJ3ab1I605PtfS`gBv(0pYw#PsEsZMb`8i*3+K+}=cqH*VIsVvR@hzn-y7%DdW;jLM)Q3Bne+yD9QVnGM"
    "a8Y~-^1QzC;Y#mHbU4`)XFlYREWW=_OlKA(SJyn<3}>^=AW7o6bHfucj;GGfZey#lZPl?4Wh?%~&hOz5{R<5`=70"
)


def test_damaged_statistics_do_not_end_the_process(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(zlib.decompress(base64.b85decode(DAMAGED_STATISTICS)))
    code = (
        "import sys; from tests.data.sources.reading import DataConfig, problem; "
        "problem(sys.argv[1], data=DataConfig(text_field='messages'))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.parquet")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
