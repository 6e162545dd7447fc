"""
Compiled functions called by their address, so that the loop around them is compiled once for all of them.

A parallel loop takes Numba seconds to compile, most of them spent on the code of what it calls; behind an address that
code is compiled once, by itself.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic


def address_for(function: Any, known: tuple[types.Type, ...]) -> int:
    """Where the machine code of a function that returns nothing begins, compiled for arguments of these types."""
    function.compile(known)
    compiled = function.overloads[known]
    return int(compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name))


@intrinsic
def call(typing_context: Any, where: Any, arguments: Any) -> Any:
    """
    Call the function at address `where` with the elements of a tuple, of exactly the types it was compiled for.

    An unsigned address stands for a signed one; a float64 is refused, for that is what both together become in Numba.
    """
    if types.float64 in arguments.types:
        raise TypingError(f"an address is signed on one way and unsigned on another: {arguments}")

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        given = signature.args[1].types
        pointee = context.call_conv.get_function_type(types.none, given)
        function = builder.inttoptr(values[0], ir.PointerType(pointee))
        unpacked = cgutils.unpack_tuple(builder, values[1], len(given))
        status, _ = context.call_conv.call_function(builder, function, types.none, given, unpacked)
        with cgutils.if_unlikely(builder, status.is_error):
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), codegen
