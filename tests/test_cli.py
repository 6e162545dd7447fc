"""The command line: what it prints, what it writes, and how it ends."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

import cumoe
from cumoe import _demo, _info, cli
from cumoe.bench import ceilings, cpu, cpu_contenders, results, shapes, weights

T, E, H, I, K = 7, 4, 32, 48, 2


@pytest.fixture
def limits(monkeypatch):
    """Fixed machine ceilings, so that no test waits for a measurement."""
    fixed = ceilings.Ceilings(10.0, 1 << 20, 100.0, "avx", 2)
    monkeypatch.setattr(ceilings, "measure", lambda products, *_: fixed)
    monkeypatch.setattr(cpu_contenders, "PEERS", ())
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    return fixed


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Two small Mixtral checkpoints, by dtype."""
    rng = np.random.default_rng(0)
    names = {"gate": (E, H)}
    for e in range(E):
        names |= {f"experts.{e}.w1": (I, H), f"experts.{e}.w3": (I, H), f"experts.{e}.w2": (H, I)}
    drawn = {name: rng.standard_normal(shape, np.float32) * shape[1] ** -0.5 for name, shape in names.items()}
    folders = {}
    for dtype in ("float32", "bfloat16"):
        folder = folders[dtype] = tmp_path_factory.mktemp(dtype)
        config = {"model_type": "mixtral", "hidden_size": H, "intermediate_size": I, "num_local_experts": E}
        config |= {"num_experts_per_tok": K, "num_hidden_layers": 1, "hidden_act": "silu", "torch_dtype": dtype}
        (folder / "config.json").write_text(json.dumps(config))
        tensors = {
            f"model.layers.0.block_sparse_moe.{name}.weight": array.astype(dtype) for name, array in drawn.items()
        }
        save_file(tensors, folder / "model.safetensors")
    return folders


def tokens(shape=(T, H), dtype="float32"):
    return np.random.default_rng(1).standard_normal(shape, np.float32).astype(dtype)


def run_layer(folder, source, target, *more):
    return cli.main(["run", str(folder), "--layer", "0", "--input", str(source), "--output", str(target), *more])


def demo(*options):
    return cli.main(["demo", "--shape", "tiny", "--tokens", "20", "--device", "cpu", *options])


# -- in general -------------------------------------------------------------------------------------


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "cumoe", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"cumoe {cumoe.__version__}\n"


def test_the_installed_command_is_this_one():
    from importlib.metadata import entry_points

    (command,) = entry_points(group="console_scripts", name="cumoe")
    assert command.load() is cli.main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: name"),
        (["walk"], "invalid choice: 'walk'"),
        (["demo", "--shape", "huge"], "invalid choice: 'huge'"),
        (["demo", "--tokens", "0"], "must be >= 1, got 0"),
        (["demo", "--tokens", "few"], "invalid"),
        (["run", "folder"], "required: --layer, --input, --output"),
        (["bench", "--dtypes", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_wrong_usage_ends_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_help_names_every_shape(capsys):
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in shapes.SHAPES)


def test_an_interrupt_ends_quietly(monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(_demo, "run", stop)
    assert demo() == 130


# -- demo -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", shapes.DTYPES)
def test_demo_prints_every_stage_and_a_verdict(limits, dtype, capsys):
    assert demo("--dtype", dtype) == 0
    text = capsys.readouterr().out
    assert f"tiny (E 8, k 2, H 64, I 96), {dtype}" in text
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split("[│|]", line)]
        if len(cells) > 3:
            rows[cells[1]] = cells[2:-1]
    assert rows.keys() == {*_demo.STAGES, "total"}
    for name, (time_ms, gflops, gbs, of_floor, bound) in rows.items():
        assert float(time_ms) > 0
        assert (gflops == "-") == (name not in ("gemm1", "gemm2", "total"))
        assert float(gbs) >= 0
        assert float(of_floor) >= 0
        assert bound in ("memory", "compute")
    assert "reads 10.0 GB/s" in text
    assert "100 GFLOP/s (avx micro-kernel), 2 threads" in text
    ratio = re.search(r"max\(error/bound\) = ([\d.]+) over 16 tokens against float64: within the bound", text)
    assert 0 < float(ratio[1]) <= 1
    assert "draw weights" in text  # progress


def test_demo_ends_with_1_when_the_result_is_wrong(limits, monkeypatch, capsys):
    right = cumoe.fused_experts
    monkeypatch.setattr(cumoe, "fused_experts", lambda *arguments: right(*arguments) * 2, raising=False)
    assert demo() == 1
    assert "BEYOND the bound" in capsys.readouterr().out


def test_demo_takes_a_smaller_shape_when_memory_is_short(limits, monkeypatch, capsys):
    monkeypatch.setattr(_info, "available_memory", lambda: 300 << 20)
    assert cli.main(["demo", "--tokens", "5", "--device", "cpu"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "qwen3-30b-a3b with 5 tokens needs 2.69 GB and 0.31 GB are free: taking tiny instead" in text


@pytest.mark.parametrize(
    ("free", "taken"), [(8 << 30, "qwen3-30b-a3b"), (2 << 30, "mixtral"), (400 << 20, "small"), (290 << 20, "tiny")]
)
def test_the_largest_shape_that_fits_is_taken(monkeypatch, free, taken):
    monkeypatch.setattr(_info, "available_memory", lambda: free)
    console = Console(file=io.StringIO())
    wanted = shapes.SHAPES["qwen3-30b-a3b"]
    assert _demo.fitting_shape(console, wanted, "bfloat16", 16).name == taken
    assert ("instead" in console.file.getvalue()) == (taken != wanted.name)


def test_demo_without_any_memory_says_so(monkeypatch, capsys):
    monkeypatch.setattr(_info, "available_memory", lambda: 1 << 20)
    assert demo() == 2
    assert capsys.readouterr().err == "cumoe demo: even tiny with 20 tokens needs more than the 0.00 GB that are free\n"


def test_a_gpu_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(_info, "gpus", lambda: {"CUDA": "none"})
    assert cli.main(["demo", "--shape", "tiny", "--device", "gpu"]) == 2
    message = "device must be 'cpu' or 'auto' here, got 'gpu'; CuPy sees no CUDA device"
    assert capsys.readouterr().err == f"cumoe demo: {message}\n"


def test_timing_the_stages_computes_the_layer():
    shape = shapes.SHAPES["tiny"]
    prepared = cumoe.prepare(*weights.draw(shape, "bfloat16"))
    batch = _demo._draw_batch(shape, 9, "bfloat16", 0)
    stages = {name: _demo.Measured() for name in _demo.STAGES}
    for number in range(5):
        out = _demo._run_stages(batch, prepared, shape, number, stages)
        np.testing.assert_array_equal(
            out.view(np.uint16), _demo._run_once(batch, prepared, shape.top_k, number).view(np.uint16)
        )
    assert all(len(measured.seconds) == len(measured.num_bytes) == 5 for measured in stages.values())
    assert batch.router_logits[0].shape == (9, 8)


def test_bytes_of_the_stages_count_every_array_once():
    shape = shapes.Shape("", num_experts=5, top_k=2, hidden_size=3, intermediate_size=7)
    found = _demo.stage_bytes(shape, np.array([[0, 4], [4, 0], [0, 1]]), logit_size=4, itemsize=2)
    x, h, y, out = 3 * 3, 6 * 7, 6 * 3, 3 * 3  # elements; three experts are hit
    assert found == {
        "route": 3 * 5 * 4 + 6 * (4 + 4),
        "permute": 6 * (4 + 4 + 4) + 6 * 8,
        "gemm1": 2 * (3 * 14 * 3 + x + h),
        "gemm2": 2 * (3 * 3 * 7 + h + y),
        "unpermute": 2 * (y + out),
    }


# -- run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(T, H), (2, 3, H), (0, H)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_writes_what_the_layer_gives(checkpoints, tmp_path, capsys, dtype, shape):
    x = tokens(shape, dtype)
    np.save(tmp_path / "x.npy", x)
    assert run_layer(checkpoints[dtype], tmp_path / "x.npy", tmp_path / "y.npy") == 0
    y = cli.load_array(tmp_path / "y.npy")
    assert y.dtype.name == dtype
    expected = cumoe.load_layer(checkpoints[dtype], 0)(x)
    assert y.shape == shape
    assert y.tobytes() == expected.tobytes()
    assert f"wrote {tmp_path / 'y.npy'} {shape} {dtype}" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.npy", "y.npy"]


@pytest.mark.parametrize("source", ["bfloat16", "float16", "float32", "float64", ">f4"])
def test_tokens_are_converted_to_the_layer_and_the_result_on_request(checkpoints, tmp_path, source):
    x = tokens(dtype="float32").astype(source)
    np.save(tmp_path / "x.npy", x)
    assert run_layer(checkpoints["bfloat16"], tmp_path / "x.npy", tmp_path / "y.npy", "--dtype", "float32") == 0
    y = np.load(tmp_path / "y.npy")
    expected = cumoe.load_layer(checkpoints["bfloat16"], 0)(x.astype(ml_dtypes.bfloat16)).astype(np.float32)
    np.testing.assert_array_equal(y, expected)


def test_an_old_output_is_replaced_and_a_failed_run_leaves_it(checkpoints, tmp_path, capsys):
    target = tmp_path / "y.npy"
    target.write_bytes(b"old")
    np.save(tmp_path / "x.npy", tokens((T, H + 1)))
    assert run_layer(checkpoints["float32"], tmp_path / "x.npy", target) == 2
    assert target.read_bytes() == b"old"
    assert f"H = {H}" in capsys.readouterr().err
    np.save(tmp_path / "x.npy", tokens())
    assert run_layer(checkpoints["float32"], tmp_path / "x.npy", target) == 0
    assert np.load(target).shape == (T, H)


def test_a_write_that_fails_leaves_nothing_new(tmp_path, monkeypatch):
    target = tmp_path / "y.npy"
    target.write_bytes(b"old")

    def fails(file, array, allow_pickle):
        file.write(b"half")
        raise OSError("disk is full")

    monkeypatch.setattr(np, "save", fails)
    with pytest.raises(OSError, match="disk is full"):
        cli.save_array(target, tokens())
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def write_npz(path):
    with open(path, "wb") as file:
        np.savez(file, a=np.ones(2))


def write_objects(path):
    with open(path, "wb") as file:
        np.save(file, np.array([None, 1]), allow_pickle=True)


def write_short(path):
    with open(path, "wb") as file:
        np.save(file, np.ones((T, H)))
    path.write_bytes(path.read_bytes()[:-8])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_bytes(b""), "must be a whole .npy file with one array of numbers: "),
        (lambda path: path.write_bytes(b"text"), "must be a whole .npy file with one array of numbers: "),
        (write_short, "must be a whole .npy file with one array of numbers: "),
        (write_objects, "must be a whole .npy file with one array of numbers: "),
        (write_npz, "must be an .npy file with one array, got an .npz archive\n"),
        (
            lambda path: np.save(path, np.ones((T, H), int)),
            "must hold bfloat16, float16, float32 or float64, got int64",
        ),
        (lambda path: np.save(path, np.ones(3, "V1")), "must hold bfloat16, float16, float32 or float64, got |V1"),
    ],
)
def test_an_input_that_is_no_array_of_tokens_is_named(checkpoints, tmp_path, capsys, write, message):
    source = tmp_path / "x.npy"
    write(source)
    assert run_layer(checkpoints["float32"], source, tmp_path / "y.npy") == 2
    assert capsys.readouterr().err.startswith(f"cumoe run: {source} {message}")
    assert not (tmp_path / "y.npy").exists()


def test_missing_files_are_named(checkpoints, tmp_path, capsys):
    assert run_layer(checkpoints["float32"], tmp_path / "none.npy", tmp_path / "y.npy") == 2
    assert "none.npy" in capsys.readouterr().err
    np.save(tmp_path / "x.npy", tokens())
    assert run_layer(tmp_path / "nowhere", tmp_path / "x.npy", tmp_path / "y.npy") == 2
    assert "nowhere" in capsys.readouterr().err
    assert run_layer(checkpoints["float32"], tmp_path / "x.npy", tmp_path / "no" / "y.npy") == 2
    assert "y.npy" in capsys.readouterr().err


# -- info and bench ---------------------------------------------------------------------------------


def test_info_prints_every_fact(capsys, monkeypatch):
    monkeypatch.setattr(_info, "gpus", lambda: {"CUDA": "needs 'cumoe[cuda13]'"})
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for section in ("versions", "cpu", "kernels", "gpu"):
        assert re.search(rf"^{section}\s*$", text, re.MULTILINE)
    for fact in (cumoe.__version__, np.__version__, "bfloat16", "threading layer", "cumoe[cuda13]"):
        assert fact in text


def test_info_names_the_kernel_that_is_used():
    from cumoe.cpu import microkernel

    for dtype, text in list(_info.kernels().items())[:-1]:
        assert text.split()[0] == microkernel.choose(dtype).name == cumoe.plan(1, 32, 32, 2, 1, dtype=dtype).kernel


def test_the_threading_layer_is_not_the_one_that_ends_the_process():
    code = "from cumoe import _info; print(_info.cpu()['threading layer'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("tbb", "omp")


def test_free_memory_is_that_of_the_container(monkeypatch):
    monkeypatch.setattr(_info, "_free_memory", lambda: 5000)
    monkeypatch.setattr(_info, "_group_limits", lambda: [])
    assert _info.available_memory() == 5000
    monkeypatch.setattr(_info, "_group_limits", lambda: [1 << 62, 3000])
    assert _info.available_memory() == 3000


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_commit_says_whether_files_differ(tmp_path):
    def git(*command):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True, capture_output=True)

    assert _info.git_commit(tmp_path) == ""
    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "a")
    assert re.fullmatch(r"[0-9a-f]{12}", _info.git_commit(tmp_path))
    (tmp_path / "a").write_text("2")
    assert _info.git_commit(tmp_path).endswith("+")


def test_bench_writes_into_the_folder_that_is_named(limits, tmp_path, capsys):
    options = ["--shapes", "tiny", "--tokens", "2", "--dtypes", "float32", "--seconds", "0.01"]
    assert cli.main(["bench", "--suite", "cpu", *options, "--output", str(tmp_path / "new")]) == 0
    (path,) = (tmp_path / "new").iterdir()
    facts, rows = results.read(path)
    assert facts["suite"] == "cpu"
    assert {row["T"] for row in rows} == {"2"}
    assert "tiny, float32, uniform routing, gaps" in capsys.readouterr().out


def test_bench_holds_weights_in_a_scheme_and_lets_torch_have_huge_pages(limits, tmp_path, monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    words = "bench --shapes tiny --tokens 20 --seconds 0.01 --output".split()
    assert cli.main([*words, str(tmp_path), "--dtypes", "int8 w8a8", "mxfp4 w4a16"]) == 0
    (path,) = tmp_path.iterdir()
    cells = [(row["dtype"], row["routing"]) for row in results.read(path)[1]]
    assert cells == [(dtype, kind) for dtype in ("int8 w8a8", "mxfp4 w4a16") for kind in ("uniform", "skewed")]
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_the_gpu_suite_has_no_schemes(capsys):
    assert cli.main(["bench", "--suite", "gpu", "--dtypes", "float16", "int8 w8a8"]) == 2
    message = "dtypes must be of bfloat16, float16, float32 for suite gpu, got 'int8 w8a8'"
    assert message in capsys.readouterr().err


def test_bench_ends_with_1_when_the_result_is_wrong(monkeypatch, tmp_path, capsys):
    def wrong(*arguments, **named):
        raise cpu.WrongResultError("cumoe is at 2 of its error bound for 1 tokens")

    monkeypatch.setattr(cpu, "run", wrong)
    assert cli.main(["bench", "--output", str(tmp_path)]) == 1
    assert "cumoe bench: cumoe is at 2 of its error bound" in capsys.readouterr().err


def test_results_go_beside_the_benchmarks_by_default(limits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["bench", "--shapes", "tiny", "--tokens", "1", "--dtypes", "float32", "--seconds", "0.01"])
    assert len(list(Path("benchmarks/results").glob("cpu-*.csv"))) == 1
