"""The command lines: which flag sets what, and what a wrong one is told."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.__main__ import main as octavo
from octavo.runtime.config import EngineConfig
from octavo.serve.arguments import flags_of, options_of, serve_parser
from octavo.serve.cli import _with_threads, main
from octavo.serve.options import ServerOptions


def _options(*argv: str) -> tuple[EngineConfig, ServerOptions]:
    return options_of(serve_parser("serve").parse_all(argv))


def test_nothing_given_is_every_default():
    assert _options() == (EngineConfig(max_queued_requests=1024), ServerOptions())


def test_a_servers_queue_has_an_end():
    assert _options("--max-running-requests", "8")[0].max_queued_requests == 32
    assert _options("--max-queued-requests", "5")[0].max_queued_requests == 5
    assert flags_of(*_options("--max-running-requests", "8")) == ["--max-running-requests", "8"]


@pytest.mark.parametrize("argv", [["--model-path", "m"], ["--model", "m"], ["m"], ["--model-path=m"], ["m", "--model", "m"]])
def test_three_ways_to_name_the_model(argv):
    assert _options(*argv)[0].model_path == "m"


def test_every_engine_flag():
    config, _ = _options(
        "--tokenizer-path", "t", "--revision", "r", "--device", "cpu", "--dtype", "float32", "--kv-cache-dtype", "int8",
        "--max-total-tokens", "4096", "--max-running-requests", "8", "--max-queued-requests", "9", "--chunked-prefill-size", "128",
        "--page-size", "64", "--context-length", "1024", "--schedule-policy", "lpm", "--max-radix-cache-len", "512",
        "--chat-template", "c.jinja", "--random-seed", "3", "--num-threads", "2",
    )  # fmt: skip
    wanted = {
        "tokenizer_path": "t", "revision": "r", "device": "cpu", "dtype": "float32", "kv_cache_dtype": "int8",
        "max_total_tokens": 4096, "max_running_requests": 8, "max_queued_requests": 9, "chunked_prefill_size": 128,
        "page_size": 64, "context_length": 1024, "schedule_policy": "lpm", "max_radix_cache_len": 512, "chat_template": "c.jinja",
        "random_seed": 3, "num_threads": 2,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert _options("--mem-fraction-static", "0.5", "--max-total-tokens", "64")[0].mem_fraction_static == 0.5
    assert _options("--disable-radix-cache")[0].disable_radix_cache is True
    assert _options("--seed", "4")[0].random_seed == 4


def test_every_server_flag():
    _, options = _options(
        "--host", "0.0.0.0", "--port", "8000", "--api-key", "a", "--api-key", "b", "--served-model-name", "n", "--log-level", "debug",
        "--strict-model-names", "--shutdown-timeout", "30",
    )  # fmt: skip
    assert options == ServerOptions(
        host="0.0.0.0",
        port=8000,
        api_keys=("a", "b"),
        served_model_name="n",
        log_level="debug",
        strict_model_names=True,
        shutdown_timeout_s=30.0,
    )


def test_flags_are_told_where_they_differ():
    assert flags_of(*_options("--port", "30000", "--page-size", "16", "m")) == []
    words = ["--dtype", "float16", "--disable-radix-cache", "--shutdown-timeout", "0.5", "--tokenizer-path", "a b", "--seed", "0"]
    assert _options(*flags_of(*_options(*words))) == _options(*words)
    assert flags_of(*_options("--api-key", "s3cret", "--api-key", "other")) == ["--api-key", "...", "--api-key", "..."]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model-pth", "m"], "unknown flag --model-pth; did you mean --model-path?"),
        (["--max-runing-requests=3"], "did you mean --max-running-requests?"),
        (["--xyzzy"], "--help lists the flags"),
        (["--nope"], "unknown flag --nope; --help lists the flags"),
        (["--prot", "1"], "did you mean --port?"),
        (["--port"], "--port has no value"),
        (["--model"], "--model-path has no value"),
        (["--disable-radix-cache=1"], "--disable-radix-cache takes no value"),
        (["--mem-fraction", "0.5"], "unknown flag --mem-fraction; did you mean --mem-fraction-static?"),
        (["--shutdown", "5"], "did you mean --shutdown-timeout?"),
        (["--shutdown-timeout", "soon"], "--shutdown-timeout 'soon' is not valid: give a number"),
        (["--shutdown-timeout", "-1"], "--shutdown-timeout -1 is not valid: give seconds"),
        (["--shutdown-timeout", "nan"], "--shutdown-timeout nan is not valid: give seconds"),
        (["--shutdown-timeout", "inf"], "--shutdown-timeout inf is not valid: give seconds"),
        (["--port", "many"], "--port 'many' is not valid: give a whole number"),
        (["--port", "70000"], "--port 70000 is not valid: give a number from 1 to 65535"),
        (["--host", ""], "--host '' is not valid: give"),
        (["--log-level", "loud"], "--log-level 'loud' is not valid: give debug, info, warning, error or critical"),
        (["--served-model-name", " "], "--served-model-name ' ' is not valid: give"),
        (["--device", "tpu"], "--device 'tpu' is not valid: give auto, cpu or cuda"),
        (["--schedule-policy", "random"], "--schedule-policy 'random' is not valid: give fcfs or lpm"),
        (["--seed", "x"], "--random-seed 'x' is not valid: give a whole number"),
        (["--mem-fraction-static", "half"], "--mem-fraction-static 'half' is not valid: give a number"),
        (["--tp", "0"], "--tp-size 0 is not valid: give a whole number of at least 1"),
        (["--pp", "0"], "--pp-size 0 is not valid: give a whole number of at least 1"),
        (["--num-nodes", "2", "--node-rank", "1"], "--node-rank 1 needs --dist-init-addr HOST:PORT"),
        (["--nnodes", "2", "--dist-init-addr", "10.0.0.1"], "--dist-init-addr '10.0.0.1' is not valid: give HOST:PORT"),
        (["--nnodes", "2", "--dist-init-addr", "h:5000"], "--node-rank is missing: with --dist-init-addr give 0 on the first machine"),
        (["--nnodes", "2", "--dist-init-addr", "h:5000", "--node-rank", "2"], "--node-rank 2 is not valid: with --dist-init-addr"),
        (["--dist-init-addr", "h:5000"], "--dist-init-addr h:5000 is for several machines: give --nnodes too"),
        (["--tp", "3", "--pp", "1", "--nnodes", "2"], "cannot be shared equally by --nnodes 2"),
        (["--dp", "2", "--nnodes", "2"], "--dp-size 2 and --nnodes 2 do not go together"),
        (["--tp", "two"], "--tp-size 'two' is not valid: give a whole number"),
        (["--log-format", "xml"], "--log-format 'xml' is not valid: give text or json"),
        (["--log-file", "/no/such/folder/x.log"], "--log-file /no/such/folder/x.log cannot be opened"),
        (["--queue-timeout", "0"], "--queue-timeout 0.0 is not valid: give seconds, more than 0"),
        (["--request-timeout", "nan"], "--request-timeout nan is not valid"),
        (["--admin-api-key", " "], "--admin-api-key is not valid, it is empty"),
        (["--api-key-file", "/no/such/file"], "--api-key-file '/no/such/file' cannot be read"),
        (["--config", "/no/such/file"], "--config /no/such/file: No such file"),
        (["a", "b"], "unexpected argument 'b'"),
        (["a", "--model-path", "b"], "two models"),
        (["--api-key", ""], "--api-key is not valid, it is empty"),
        (["--mem-fraction-static", "1.5"], "--mem-fraction-static 1.5 is not valid: give"),
    ],
)
def test_bad_command_lines_end_with_two(argv, words, capsys):
    assert main(argv) == 2
    assert words in capsys.readouterr().err


def test_a_config_file_gives_flags_and_the_command_line_wins(tmp_path):
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model-path: m\nport: 8000\nmax_running_requests: 8\ndisable-radix-cache: true\nstrict-model-names: false\n"
        "api-key: [a, b]\nmem-fraction-static: 0.5\ntp: 1\n--served-model-name: n\n"
    )
    config, options = _options("--config", str(file), "--port", "9000")
    assert (config.model_path, config.max_running_requests, config.disable_radix_cache, config.mem_fraction_static) == ("m", 8, True, 0.5)
    assert (options.port, options.api_keys, options.strict_model_names, options.served_model_name) == (9000, ("a", "b"), False, "n")
    assert _options("other", "--config", str(file))[0].model_path == "other"
    file.write_text("api-key: 0123\nrevision: 1.10\nenable-metrics: false\nserved-model-name: null\nport: 0x10\n")
    with pytest.raises(SystemExit):
        _options("--config", str(file))  # 0x10 is no decimal number, and nothing else is made of it
    file.write_text("api-key: 0123\nrevision: 1.10\nenable-metrics: false\nserved-model-name: null\n")
    config, options = _options("--config", str(file))
    assert (options.api_keys, config.revision, options.enable_metrics, options.served_model_name) == (("0123",), "1.10", False, None)
    file.write_text("")
    assert _options(f"--config={file}") == _options()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prot: 1", "unknown flag --prot; did you mean --port?"),
        ("port: many", "--port 'many' is not valid"),
        ("- port", "must hold a mapping"),
        ("port: {a: 1}", "port must be a value or a list of values"),
        ("port: [", "is not valid YAML at line 1"),
        ("port: [1, 2]", "--port has several values"),
        ("prot: false", "unknown flag --prot"),
        ("config: other.yaml", "names another config"),
        ("port: 99999", "--port 99999 is not valid"),
    ],
)
def test_a_bad_config_file_is_named(tmp_path, capsys, content, words):
    file = tmp_path / "serve.yaml"
    file.write_text(content)
    assert main(["--config", str(file)]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "99999" in content or str(file) in told


def test_keys_from_a_file_and_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("one\n# three\n\n  two  \n")
    monkeypatch.setenv("OCTAVO_API_KEY", "three")
    monkeypatch.setenv("OCTAVO_ADMIN_API_KEY", "root")
    config, options = _options("--api-key", "zero", "--api-key-file", str(file))
    assert (options.api_keys, options.admin_api_keys) == (("zero", "one", "two", "three"), ("root",))
    assert flags_of(config, options) == ["--api-key", "..."] * 4 + ["--admin-api-key", "..."]
    file.write_text("\n")
    with pytest.raises(SystemExit):
        _options("--api-key-file", str(file))
    monkeypatch.setenv("OCTAVO_API_KEY", "abc\n")  # as a mounted secret is
    assert _options()[1].api_keys == ("abc",)


def test_a_config_that_is_not_yaml_keeps_its_keys_secret(tmp_path, capsys):
    file = tmp_path / "serve.yaml"
    file.write_text('api-key: "sk-very-secret\n')
    assert main(["--config", str(file)]) == 2
    told = capsys.readouterr().err
    assert "is not valid YAML" in told
    assert "secret" not in told


def test_metrics_are_on_unless_turned_off():
    assert [_options(*argv)[1].enable_metrics for argv in ([], ["--enable-metrics"], ["--disable-metrics"])] == [True, True, False]
    assert flags_of(*_options("--disable-metrics")) == ["--disable-metrics"]


def test_help_tells_the_defaults_of_the_dataclasses(capsys):
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 30000)" in text
    assert "before they are cut; a second signal cuts them at once (default: 5.0)" in text
    chunk = next(field.default for field in dataclasses.fields(EngineConfig) if field.name == "chunked_prefill_size")
    assert f"(default: {'automatic' if chunk is None else chunk})" in text
    for group in ("model:", "server:", "memory and prefix cache:", "scheduling:"):
        assert group in text


def test_octavo_dispatches(capsys):
    assert octavo(["--version"]) == 0
    assert capsys.readouterr().out.startswith("octavo 0.")
    assert octavo(["--help"]) == 0
    assert "serve" in capsys.readouterr().out
    assert octavo(["serve", "--help"]) == 0
    assert octavo([]) == 2
    capsys.readouterr()
    assert octavo(["srve"]) == 2
    assert "did you mean serve?" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["octavo", "octavo.serve", "octavo.launch_server"])
def test_modules_run(module):
    argv = ["serve", "--help"] if module == "octavo" else ["--help"]
    ended = subprocess.run([sys.executable, "-m", module, *argv], check=False, capture_output=True, text=True, timeout=30)
    assert ended.returncode == 0, ended.stderr
    assert "--model-path" in ended.stdout


@pytest.mark.parametrize(
    ("words", "told"), [(["run", "app:build", "--blocking"], "ray: run app:build --blocking"), (["--help"], "usage: octavo serve")]
)
def test_rays_command_of_the_same_name_gets_its_words(words: list[str], told: str, tmp_path: Path) -> None:
    """The scripts `serve` of both packages lie in one folder, and the one that was installed last is there."""
    (tmp_path / "ray" / "serve").mkdir(parents=True)
    for name in ("__init__.py", "serve/__init__.py"):
        (tmp_path / "ray" / name).touch()
    (tmp_path / "ray" / "serve" / "scripts.py").write_text("import sys\ndef cli():\n    sys.exit('ray: ' + ' '.join(sys.argv[1:]))\n")
    code = f"import sys; sys.argv = {['serve', *words]!r}; from octavo.__main__ import serve; sys.exit(serve())"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout + done.stderr).startswith(told)


@pytest.mark.parametrize(
    ("said", "flag", "threads"), [("1", None, 1), ("4,2", None, 4), ("3", 2, 2), ("", None, None), ("all", None, None), ("0", None, None)]
)
def test_threads_are_those_that_the_environment_names(said: str, flag: int | None, threads: int | None, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert _with_threads(EngineConfig(num_threads=flag)).num_threads == threads
