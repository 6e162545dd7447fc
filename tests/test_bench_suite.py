"""The CPU suite, its result files and the README's table: every row is there, and every file is whole."""

import functools
import importlib.util
import io
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

import cumoe
from cumoe.bench import ceilings, cpu, cpu_check, cpu_contenders, cpu_tables, peers, results, schemes, shapes, timing

ROOT = Path(__file__).parents[1]
TINY = shapes.SHAPES["tiny"]
EVERYONE = cpu_contenders.PEERS
TWO = tuple(peer for peer in peers.PEERS if peer.name in ("torch loop", "NumPy loop"))


def quiet():
    return Console(file=io.StringIO(), width=200)


def readme_script():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- the suite ------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Make the parts of the suite that take long short."""

    def measure(products, available_bytes=None, budget_s=None):
        return ceilings.Ceilings(10.0, 1 << 20, 100.0, f"named here, {products}", 2)

    monkeypatch.setattr(ceilings, "measure", measure)
    monkeypatch.setattr(cpu_contenders, "PEERS", TWO)
    monkeypatch.setattr(timing, "_BURST", 3)
    monkeypatch.setattr(timing, "compare", functools.partial(timing.compare, gap_s=0.0, min_rounds=5, max_rounds=5))


def run_suite(folder, console=None, **options):
    small = {"shape_names": ["tiny"], "num_tokens": [1, 20], "dtypes": ["float32"], "routings": ["uniform"]}
    options = {**small, "budget_s": 0.01, **options}
    return cpu.run(console or quiet(), output=folder, **options)


def test_limits_of_a_case_are_those_before_and_after_it(quick, tmp_path, monkeypatch):
    seen = []

    def measure(products, available_bytes=None, budget_s=None):
        seen.append(budget_s)
        return ceilings.Ceilings(float(2 ** len(seen)), 1 << 20, 10.0 * 2 ** len(seen), "tile", 2)

    monkeypatch.setattr(ceilings, "measure", measure)
    _, rows = results.read(run_suite(tmp_path, num_tokens=[1, 20]))
    found = {(row["T"], row["mode"]): (row["stream_gbs"], row["peak_gflops"]) for row in rows}
    assert len(seen) == 1 + 2 * 3 and seen[0] is None
    assert found == {
        ("1", "gaps"): ("6.00", "80.0"),
        ("1", "back-to-back"): ("24.00", "320.0"),
        ("20", "gaps"): ("96.00", "1280.0"),
    }


def test_the_suite_writes_every_case(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_contenders, "PEERS", EVERYONE)
    console = quiet()
    dtypes = "bfloat16", "int4 w4a16"
    path = run_suite(tmp_path, console, dtypes=dtypes, routings=["uniform", "skewed"])
    facts, rows = results.read(path)
    assert facts["suite"] == "cpu"
    assert {"date", "commit", "command", "cpu model", "cpu instruction sets", "kernel bfloat16"} <= facts.keys()
    assert facts["version cumoe"] == cumoe.__version__ and facts["version numba"]
    installed = {peer.needs[-1] for peer in EVERYONE if importlib.util.find_spec(peer.needs[-1])}
    assert ("version transformers" in facts) == ("transformers" in installed)
    assert ("version zentorch" in facts) == ("zentorch" in installed)
    found = {(row["dtype"], row["routing"], row["T"], row["mode"], row["method"]) for row in rows}
    cells = [("1", "gaps"), ("1", "back-to-back"), ("20", "gaps")]
    assert found == {
        (dtype, routing, num_tokens, mode, method)
        for dtype in dtypes
        for routing in ("uniform", "skewed")
        for num_tokens, mode in cells
        for method in methods(dtype, int(num_tokens))
    }
    assert len(rows) == len(found)
    for row in rows:
        scheme = schemes.SCHEMES[row["dtype"]]
        assert 0 < float(row["best_us"]) <= float(row["time_us"])
        assert float(row["relative_error"]) <= cpu_check.ROUNDED_TOLERANCE
        assert (row["method"] != "cumoe") or row["ratio_to_cumoe"] == "1.000"
        seconds, flops = float(row["time_us"]) * 1e-6, TINY.flops(int(row["T"]))
        num_bytes = scheme.moved_bytes(TINY, int(row["T"]), round(float(row["experts_hit"])))
        assert float(row["gflops"]) == pytest.approx(flops / seconds * 1e-9, rel=0.02, abs=0.06)
        assert float(row["gbs"]) == pytest.approx(num_bytes / seconds * 1e-9, rel=0.02, abs=0.006)
        assert (row["peak_kernel"], row["peak_gflops"]) == (f"named here, {scheme.products}", "100.0")
    printed = console.file.getvalue()
    assert "tiny, bfloat16, uniform routing, back-to-back" in printed and str(path) in printed
    assert "named here, bfloat16 micro-kernel 100 GFLOP/s" in printed


def methods(scheme, num_tokens):
    """Those that take part here."""
    return {
        "cumoe",
        *(
            peer.name
            for peer in EVERYONE
            if not peer.missing(scheme)
            and num_tokens <= (peer.most_tokens or num_tokens)
            and peer.name not in ("vLLM SGL w4a8", "ggml q4_K")  # the shape is too small for them
        ),
    }


def test_weights_are_prepared_once_for_all_routings(quick, tmp_path, monkeypatch):
    makes = []

    def make(w1, w2):
        makes.append(w1)
        return lambda x, topk_weights, topk_ids: cumoe.fused_experts(x, w1, w2, topk_weights, topk_ids)

    peer = peers.Peer("twin", "", ("numpy",), ("float32",), make, peers.nothing_copied)
    monkeypatch.setattr(cpu_contenders, "PEERS", (peer,))
    _, rows = results.read(run_suite(tmp_path, routings=["uniform", "skewed"], num_tokens=[20]))
    assert len(makes) == 1
    assert [(row["routing"], row["method"]) for row in rows] == [
        (routing, method) for routing in ("uniform", "skewed") for method in ("twin", "cumoe")
    ]


def test_a_peer_with_wrong_results_or_errors_is_left_out_and_named(quick, tmp_path, monkeypatch):
    def fails(x, topk_weights, topk_ids):
        raise RuntimeError("no [such] kernel\nand more")

    def peer(name, make):
        return peers.Peer(name, "", ("numpy",), ("float32",), make, peers.nothing_copied)

    liar, broken = peer("liar", lambda w1, w2: lambda x, *routed: 2 * x), peer("broken", lambda w1, w2: fails)
    monkeypatch.setattr(cpu_contenders, "PEERS", (liar, broken))
    console = quiet()
    _, rows = results.read(run_suite(tmp_path, console))
    assert {row["method"] for row in rows} == {"cumoe"}
    printed = console.file.getvalue()
    assert re.search(r"without liar at T = 20: relative error [\d.]+", printed)
    assert "without broken at T = 20: no [such] kernel\n" in printed


def test_the_table_has_every_ratio_and_the_best():
    def row(method, num_tokens, ratio):
        cells = {"shape": "s", "dtype": "d", "routing": "r", "T": num_tokens, "mode": "gaps", "method": method}
        numbers = {"gflops": "1.0", "gbs": "2.00", "of_floor": "0.500", "bound": "memory"}
        return {**cells, **numbers, "time_us": str(2000 * ratio), "ratio_to_cumoe": f"{ratio:.3f}"}

    rows = [row("a", 1, 1.5), row("b", 1, 0.75), row("cumoe", 1, 1.0), row("a", 4, 3.0), row("cumoe", 4, 1.0)]
    rows.append(row("cumoe", 16, 1.0))
    (table,) = cpu_tables.ratio_tables(rows)
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["T"] == ["1", "4", "16"] and columns["cumoe ms"] == ["2.000"] * 3
    assert columns["best peer / cumoe"] == ["[red]0.75[/red]", "3.00", "-"]
    assert columns["a"] == ["1.50", "3.00", "-"] and columns["b"] == ["[red]0.75[/red]", "-", "-"]


def test_wrong_results_of_our_own_stop_the_suite(quick, tmp_path, monkeypatch):
    right = cumoe.fused_experts
    monkeypatch.setattr(cumoe, "fused_experts", lambda *args, **named: 2 * right(*args, **named))
    with pytest.raises(cpu.WrongResultError, match=r"cumoe is at \S+ of its error bound for 1 tokens"):
        run_suite(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_memory_does_not_hold_is_skipped_and_said(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "_MOST_BYTES", 3 * TINY.weight_bytes("float32"))
    console = quiet()
    _, rows = results.read(run_suite(tmp_path, console, shape_names=["small", "tiny"], dtypes=["bfloat16", "float32"]))
    printed = console.file.getvalue()
    assert "skipped small (E 16, k 4, H 512, I 512), bfloat16: needs 0.1 GB" in printed
    assert {(row["shape"], row["dtype"]) for row in rows} == {("tiny", "bfloat16"), ("tiny", "float32")}
    assert "without NumPy loop" not in printed  # 2 + 2 times the bfloat16 weights are within 3 times the float32 ones


# -- result files -----------------------------------------------------------------------------------


def test_a_run_cut_short_leaves_what_it_has(quick, tmp_path, monkeypatch):
    run_block = cpu._run_block

    def cut(console, shape, scheme, *more):
        if scheme.name == "float32":
            raise KeyboardInterrupt
        return run_block(console, shape, scheme, *more)

    monkeypatch.setattr(cpu, "_run_block", cut)
    with pytest.raises(KeyboardInterrupt):
        run_suite(tmp_path, dtypes=["bfloat16", "float32"], num_tokens=[20])
    (path,) = tmp_path.iterdir()
    assert {row["dtype"] for row in results.read(path)[1]} == {"bfloat16"}


def test_nothing_fits(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "_MOST_BYTES", 1000)
    with pytest.raises(MemoryError, match="no case of the suite fits the memory"):
        run_suite(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_result_file_is_read_as_written(tmp_path):
    path = tmp_path / "new" / "a.csv"
    results.write(path, {"suite": "cpu", "odd": "a: b\n# c"}, [{"x": 1, "y": "with, comma"}, {"x": 2, "y": "# z"}])
    assert results.read(path) == (
        {"suite": "cpu", "odd": "a: b # c"},
        [{"x": "1", "y": "with, comma"}, {"x": "2", "y": "# z"}],
    )


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")
    with pytest.raises(RuntimeError), results.replacing(path) as file:
        file.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permission bits are those of POSIX")
def test_a_result_file_has_ordinary_permissions(tmp_path):
    with results.replacing(tmp_path / "a") as file:
        file.write("x")
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_the_command_names_no_folder_of_this_machine(monkeypatch):
    monkeypatch.setattr("sys.argv", ["cumoe", "bench", "--output", "/a/b c/out", "--output=/d/e", "--shapes", "x/y"])
    assert results.header("gpu")["command"] == "cumoe bench --output .../out --output=.../e --shapes x/y"


def test_newest_goes_by_the_date_inside(tmp_path):
    for name, suite, date in (("z", "cpu", "2026-01-01"), ("a", "cpu", "2026-02-01"), ("b", "gpu", "2026-03-01")):
        results.write(tmp_path / f"{name}.csv", {"suite": suite, "date": date}, [])
    assert results.newest(tmp_path, "cpu") == tmp_path / "a.csv"
    assert results.newest(tmp_path, "tpu") is None


# -- the README's table -----------------------------------------------------------------------------


def test_the_readme_gets_every_row_losses_too(quick, tmp_path):
    path = run_suite(tmp_path, dtypes=["bfloat16", "float32"])
    facts, rows = results.read(path)
    for row in rows:
        if row["method"] == "NumPy loop":
            row["ratio_to_cumoe"] = "0.250"
    results.write(path, facts, rows)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- table:cpu -->\nold\n<!-- /table:cpu -->\nafter\n")
    script = readme_script()
    assert script.main(["--readme", str(readme), "--results", str(tmp_path)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- table:cpu -->\n") and text.endswith("\n<!-- /table:cpu -->\nafter\n")
    assert "old" not in text and path.name in text and facts["commit"] in text
    body = [line for line in text.splitlines() if line.startswith(("| bfloat16", "| float32"))]
    assert len(body) == 2 * 3
    head = next(line for line in text.splitlines() if line.startswith("| dtype"))
    assert all(line.count("|") == head.count("|") for line in body)
    assert all(line.endswith(" 0.25 |") for line in body)
    assert script.main(["--readme", str(readme), "--results", str(tmp_path)]) == 0
    assert readme.read_text() == text


def test_a_readme_without_markers_is_refused_and_kept(quick, tmp_path, capsys):
    run_suite(tmp_path, num_tokens=[20])
    readme = tmp_path / "README.md"
    readme.write_text("<!-- /table:cpu --> <!-- table:cpu -->")
    assert readme_script().main(["--readme", str(readme), "--results", str(tmp_path)]) == 1
    assert "no <!-- table:cpu --> followed by <!-- /table:cpu -->" in capsys.readouterr().err
    assert readme.read_text() == "<!-- /table:cpu --> <!-- table:cpu -->"


def test_without_results_the_readme_stays(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("text")
    assert readme_script().main(["--readme", str(readme), "--results", str(tmp_path / "none")]) == 0
    assert "no results of suite cpu" in capsys.readouterr().err
    assert readme.read_text() == "text"


def test_our_readme_has_the_markers():
    assert "| a |" in readme_script().replaced((ROOT / "README.md").read_text(), "cpu", "| a |")
