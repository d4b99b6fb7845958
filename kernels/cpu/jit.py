"""Machine code for functions that are emitted whole, without Numba: kernels specialised by a weight format, many of them and small.

Numba's cache knows functions by their source and not by what they were specialised for; these compile in some tens of milliseconds
and need no cache. They take and give plain integers, so that a Numba kernel calls them by address.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

_I64 = ir.IntType(64)


@functools.cache
def _engine() -> tuple[Any, Any]:
    """The host's target machine and an execution engine that holds the code for good."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = host_machine()
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine)
    return machine, engine


def host_machine(cpu: str | None = None, features: str | None = None) -> Any:
    """A target machine for this CPU, or for another of the same architecture (to look at its code, not to run it)."""
    target = binding.Target.from_triple(binding.get_process_triple())
    if cpu is None:
        cpu, features = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    return target.create_target_machine(cpu=cpu, features=features or "", opt=3, jit=features is not None)


def optimized(module: ir.Module, machine: Any) -> Any:
    """The module, parsed, verified and optimised for `machine`."""
    parsed = binding.parse_assembly(str(module))
    parsed.verify()
    options = binding.create_pipeline_tuning_options(speed_level=3)
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(parsed, builder)
    return parsed


def compile_module(module: ir.Module) -> dict[str, int]:
    """Compile a module for this machine. Gives the addresses of its functions by name; they stay valid for the process's life."""
    machine, engine = _engine()
    names = [function.name for function in module.functions if not function.is_declaration]
    engine.add_module(optimized(module, machine))
    engine.finalize_object()
    return {name: engine.get_function_address(name) for name in names}


def new_function(module: ir.Module, name: str, num_args: int) -> tuple[Any, Any]:
    """Begin a function of int64 arguments that returns nothing: its builder and its arguments."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64] * num_args), name)
    return ir.IRBuilder(function.append_basic_block()), function.args


def make_caller(num_args: int) -> Any:
    """An intrinsic `call(address, (a, b, ...))` that calls such a function by address."""

    def call(typingctx: Any, address: Any, arguments: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.FunctionType(ir.VoidType(), [_I64] * num_args)
            function = builder.inttoptr(args[0], kind.as_pointer())
            builder.call(function, [builder.extract_value(args[1], i) for i in range(num_args)])
            return context.get_dummy_value()

        return types.void(types.int64, types.UniTuple(types.int64, num_args)), codegen

    return intrinsic(call)
