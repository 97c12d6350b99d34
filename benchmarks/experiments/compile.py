import re
import sys
import time

sys.path.insert(0, ".")
import io
import pathlib

from cuda.core import Program, ProgramOptions


def flat(name, seen):
    if name in seen:
        return ""
    seen.add(name)
    out = []
    out.append(f'#line 1 "{name}"')
    for i, l in enumerate(pathlib.Path(name).read_text().splitlines(), 1):
        m = re.fullmatch(r'\s*#include "(\S+)"\s*', l)
        if m:
            out += [flat(m[1], seen), f'#line {i + 1} "{name}"']
        elif l.strip() != "#pragma once":
            out.append(l)
    return "\n".join(out)


def compile(names, arch="sm_90a", defines=None, source="wide.cuh"):
    log = io.StringIO()
    p = Program(
        flat(source, set()),
        "c++",
        ProgramOptions(name=source, arch=arch, std="c++17", ptxas_options=["-v"], lineinfo=True, define_macro=defines),
    )
    c = p.compile("cubin", name_expressions=names, logs=log)
    return c, log.getvalue()


if __name__ == "__main__":
    t = time.time()
    c, log = compile(tuple(sys.argv[1:]))
    for l in log.splitlines():
        if any(k in l for k in ("error", "C75", "Used", "spill", "warning")):
            print(l[:230])
    print(time.time() - t)
