"""SGLang's production deployment guide: its commands, endpoints and metrics work here when the module's name is exchanged.

Three of the guide's examples break in a shell, since a comment follows a line's backslash: they are here as they were meant.
"""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from octavo.serve.arguments import options_of, serve_parser

M8, M70 = "meta-llama/Meta-Llama-3-8B-Instruct", "meta-llama/Meta-Llama-3-70B-Instruct"
M405 = "meta-llama/Meta-Llama-3-405B-Instruct"
COMMANDS = {
    f"--model-path {M8} --host 0.0.0.0 --port 30000 --mem-fraction-static 0.9": {
        "model_path": M8,
        "host": "0.0.0.0",
        "mem_fraction_static": 0.9,
    },
    f"--model-path {M8} --host 0.0.0.0 --port 30000": {"port": 30000},
    f"--model-path {M8} --enable-metrics": {"enable_metrics": True},
    f"--model-path {M8} --log-level debug": {"log_level": "debug"},
    f"--model-path {M8} --log-file /var/log/sglang.log": {"log_file": "/var/log/sglang.log"},
    f"--model-path {M8} --mem-fraction-static 0.95 --max-radix-cache-len 16384 --max-running-requests 256": {
        "mem_fraction_static": 0.95,
        "max_radix_cache_len": 16384,
        "max_running_requests": 256,
    },
    f"--model-path {M8} --max-running-requests 32 --schedule-policy fcfs": {"max_running_requests": 32, "schedule_policy": "fcfs"},
    f"--model-path {M8} --api-key YOUR_SECRET_KEY": {"api_keys": ("YOUR_SECRET_KEY",)},
    "--max-radix-cache-len 4096 --mem-fraction-static 0.75 --quantization fp8": {"quantization": "fp8", "max_radix_cache_len": 4096},
    "--max-running-requests 128 --max-radix-cache-len 2048 --quantization awq": {"quantization": "awq"},
    "TheBloke/Llama-2-70B-GPTQ --quantization gptq": {"quantization": "gptq"},
    f"--model-path {M70} --tp 4 --port 30000": {"tp_size": 4, "port": 30000},
    f"--model-path {M70} --quantization fp8 --tp 4": {"tp_size": 4, "quantization": "fp8"},
    "--model-path TheBloke/Llama-2-70B-AWQ --quantization awq --tp 2": {"tp_size": 2, "quantization": "awq"},
    f"--model-path={M70} --tp=4 --host=0.0.0.0 --port=30000 --mem-fraction-static=0.9": {"tp_size": 4, "mem_fraction_static": 0.9},
    f"--model-path {M70} --tp 4 --mem-fraction-static 0.85 --max-radix-cache-len 8192": {"tp_size": 4, "max_radix_cache_len": 8192},
    f"--model-path {M405} --tp 8 --num-nodes 2": {"tp_size": 8, "nnodes": 2},
}
GREPS = {"/stats": ("cache", "queue_size", "cache_hit_rate"), "/metrics": ("duration",)}
METRICS = (
    "sglang_request_total",
    "sglang_request_duration_seconds",
    "sglang_tokens_generated_total",
    "sglang_active_requests",
    "sglang_queue_size",
    "sglang_radix_cache_hit_rate",
    "sglang_gpu_memory_used_bytes",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_means_what_it_says(command):
    config, options = options_of(serve_parser("serve").parse_all(shlex.split(command)))
    known = {**vars(config), **vars(options)}
    assert {name: known[name] for name in COMMANDS[command]} == COMMANDS[command]


def test_what_several_machines_mean():
    config, _ = options_of(serve_parser("serve").parse_all(shlex.split(f"--model-path {M405} --tp 8 --num-nodes 2")))
    inside = config.resolve(device="cuda", num_devices=8)  # as the guide's comment says
    assert (inside.num_stages, inside.num_ranks, inside.ranks_per_node) == (2, 16, 8)
    across = replace(config, tp_size=16).resolve(device="cuda", num_devices=8)  # as SGLang has it
    assert (across.num_stages, across.num_ranks, across.ranks_per_node) == (1, 16, 8)


def test_endpoints_and_what_is_grepped_for(served):
    for path in ("/health", "/v1/models", "/stats", "/metrics"):
        assert served.http.get(path).status_code == 200
    for path, words in GREPS.items():
        lines = served.http.get(path).text.splitlines()
        assert all(any(word in line for line in lines) for word in words)
    text = served.http.get("/metrics").text
    assert all(f"# TYPE {name} " in text for name in METRICS)


def test_the_request_with_a_key(start_server):
    server = start_server(api_keys=("YOUR_SECRET_KEY",))
    body = {"model": "default", "messages": [{"role": "user", "content": "Hi"}]}
    answered = server.http.post("/v1/chat/completions", json=body, headers={"Authorization": "Bearer YOUR_SECRET_KEY"})
    assert answered.status_code == 200
    assert server.http.post("/v1/chat/completions", json=body).status_code == 401
