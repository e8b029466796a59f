"""`python -m tests.vectors CPU FEATURES`: what becomes of the loops on an x86 processor, and of their IR on aarch64.

Prints for each loop how many additions and subtractions of floats are made of how many lanes. numba has to be told the
processor before it is imported, so this is a program of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from collections import Counter

X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
LOOPS = (("shortcuts", "skim_bf16"), ("shortcuts", "skim_f16"), ("shortcuts", "skim_f32"))
REGISTERS = {"x": 128, "y": 256, "z": 512}


def counts(cpu: str, features: str) -> dict[str, dict[str, Counter[int]]]:
    """Return the number of packed operations by bits of register, by loop and architecture."""
    os.environ.update(NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES=features)
    import llvmlite.binding as llvm
    import numba

    from paramdelta.engine.loops.bits import OPTIONS

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    found = {}
    for module, name in LOOPS:
        function = getattr(importlib.import_module(f"paramdelta.engine.loops.{module}"), name)
        compiled = numba.njit(function, **OPTIONS)
        signature = (numba.types.int64,) * function.__code__.co_argcount
        compiled.compile(signature)
        ir = re.sub(r"target (triple|datalayout).*\n", "", compiled.inspect_llvm(signature))
        assert "@llvm.x86" not in ir
        texts = {}
        for triple, processor, options in ((X86, cpu, features), (ARM, "generic", "")):
            target = llvm.Target.from_triple(triple).create_target_machine(cpu=processor, features=options, opt=3)
            code = llvm.parse_assembly(ir)
            code.triple = triple
            texts[triple] = target.emit_assembly(code)
        packed = re.findall(r"v(?:add|sub)p[sd]\s.*%([xyz])mm\d+\n", texts[X86])
        neon = re.findall(r"f(?:add|sub)\s+v\d+\.(?:4s|2d)", texts[ARM])
        found[name] = {"x86": Counter(REGISTERS[each] for each in packed), "aarch64": Counter({128: len(neon)})}
    return found


if __name__ == "__main__":
    print(json.dumps(counts(*sys.argv[1:])))
