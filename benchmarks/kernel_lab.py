"""Laboratory for the persistent kernels: compiles them with NVRTC through ctypes, checks and times them.

    python kernel_lab.py check            values against float64, every shape in a process of its own with a time limit
    python kernel_lab.py bench            microseconds a step, beside a cuBLAS loop in a CUDA graph and torch.nn.RNN
    python kernel_lab.py compile          registers and spills, no GPU needed

It talks to the driver and to NVRTC directly, so that the kernels can be tried without the rest of the package.
"""

# ruff: noqa: N803 - T, B and H are what the equations call them
from __future__ import annotations

import ctypes
import functools
import glob
import hashlib
import os
import pathlib
import pickle
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

SOURCE = os.environ.get("LAB_SOURCE", os.path.join(os.path.dirname(__file__), "..", "elman", "ops", "cuda"))
SHARED_LIMIT = {"90a": 227, "80": 163, "86": 99, "89": 99}
WARPS, THREADS, SLOTS = 8, 512, 8
CUBINS = os.environ.get("LAB_CUBINS", os.path.join(os.path.dirname(os.path.abspath(__file__)), "cubins"))


@dataclass(frozen=True)
class Config:
    """One instantiation and its grid."""

    row_tiles: int
    register_units: int
    shared_units: int
    blocks: int
    exchange: str
    columns: int
    groups: int
    tiles: int
    shared_bytes: int

    @property
    def template(self):
        return (
            f"{self.row_tiles}, {self.register_units}, {self.shared_units}, {self.blocks}, persistent::{self.exchange}"
        )

    def ring_bytes(self, values):
        return SLOTS * self.groups * self.tiles * self.blocks * -(-values // 32) * 512

    def __str__(self):
        shape = f"{self.row_tiles},{self.register_units},{self.shared_units},{self.blocks}"
        return f"{shape} {self.exchange:11s} {self.groups}x{self.columns}x{self.tiles}"


CLUSTERS = {
    16: 7,
    15: 7,
    14: 7,
    13: 8,
    12: 8,
    11: 8,
    10: 11,
    9: 11,
    8: 15,
    7: 16,
    6: 18,
    5: 22,
    4: 30,
    3: 40,
    2: 66,
    1: 132,
}


def fit(row_tiles, batch, hidden, exchange="PolledRing", blocks=1, sms=132, arch="90a"):
    """The grid and the split of the weights for CTAs of 16 * row_tiles hidden units; None if they do not fit."""
    columns = -(-hidden // (16 * row_tiles))
    cluster = exchange == "ClusterPush"
    if columns > (16 if cluster else sms):
        return None
    units = -(-hidden // (32 * WARPS))
    groups = -(-units // (5 if blocks == 1 else 3))
    state = units if exchange == "PolledRing" else -(-units // groups)
    budget = {1: 196, 2: 184}[blocks] - (0 if arch == "90a" else 90) - 4 * (state + row_tiles) * blocks
    register_units = max(1, min(units, budget // (8 * row_tiles)))
    rows = 8 * blocks
    all_tiles = -(-batch // rows)
    tiles = -(-all_tiles // min(CLUSTERS[columns] if cluster else sms // columns, all_tiles))
    shared = (
        2 * WARPS * rows * (16 * row_tiles + 4) * 4
        + WARPS * (units - register_units) * row_tiles * 1024
        + 4096 * row_tiles
    )
    if cluster:
        shared += -(-16 * tiles // 128) * 128 + 2 * tiles * blocks * -(-hidden // 32) * 512
    elif exchange != "PolledRing":
        shared += int(exchange[-1]) * units * blocks * WARPS * 512
    if shared > SHARED_LIMIT[arch] * 1024:
        return None
    return Config(
        row_tiles,
        register_units,
        units - register_units,
        blocks,
        exchange,
        columns,
        -(-all_tiles // tiles),
        tiles,
        shared,
    )


def model(c):
    """Microseconds a forward step, fitted to an H200; good to about 20%."""
    units = c.register_units + c.shared_units
    block = 0.30 + 0.0145 * c.row_tiles * units + 0.05 * c.row_tiles * c.shared_units
    if c.blocks == 2:
        block *= 0.93
    if c.exchange == "ClusterPush":
        return 0.55 + 0.03 * c.row_tiles * units + (c.tiles * c.blocks - 1) * (0.25 + 0.02 * units * c.row_tiles)
    if c.exchange == "PolledRing":
        return (
            0.85 + 0.02 * c.row_tiles * units + 0.02 * c.row_tiles * c.shared_units + (c.tiles * c.blocks - 1) * block
        )
    alone = 1.75 + c.blocks * block * (1.5 if c.tiles == 2 else 1)
    return max(c.tiles * c.blocks * block, alone) * (1.02 if c.exchange == "StagedRing2" and c.tiles > 3 else 1)


def loop_model(batch, hidden):
    """The same for a loop of cuBLAS products in a CUDA graph: where it is the smaller, use that."""
    return 5.3 + 0.0021 * hidden + 0.003 * batch


EXCHANGES = ("PolledRing", "StagedRing2", "StagedRing3", "ClusterPush")


def fits(batch, hidden):
    """Every sensible configuration: small clusters, polling where a group has one tile, staging where it has more."""
    found = [c for x in EXCHANGES for m in (1, 2, 3, 4, 5, 6, 7) for n in (1, 2) if (c := fit(m, batch, hidden, x, n))]
    wanted = {
        "PolledRing": lambda c: c.tiles == 1 and c.blocks == 1,
        "StagedRing2": lambda c: c.tiles > 1,
        "StagedRing3": lambda c: c.tiles > 3 and c.blocks == 1,
        "ClusterPush": lambda c: c.columns <= 8 and c.tiles * c.blocks <= 2,
    }
    return [c for c in found if wanted[c.exchange](c)]


def candidates(batch, hidden, most=4):
    return sorted(fits(batch, hidden), key=model)[:most]


def choose(batch, hidden):
    return (candidates(batch, hidden) or [fit(2, batch, hidden, "PolledRing")])[0]


class Nvrtc:
    lib = None

    def __init__(self):
        if Nvrtc.lib:
            return
        for p in sys.path:
            found = glob.glob(os.path.join(p, "nvidia", "*", "lib", "libnvrtc.so.1*"))
            if found:
                ctypes.CDLL(
                    glob.glob(os.path.join(os.path.dirname(found[0]), "libnvrtc-builtins.so*"))[0], ctypes.RTLD_GLOBAL
                )
                Nvrtc.lib = ctypes.CDLL(sorted(found)[-1])
                break
        assert self.lib, "no libnvrtc found"

    def compile(self, names, arch="90a", header="persistent.cuh"):
        texts = [pathlib.Path(f).read_text() for f in sorted(glob.glob(os.path.join(SOURCE, "*.cuh")))]
        key = os.path.join(CUBINS, hashlib.sha256(repr((names, arch, texts)).encode()).hexdigest()[:20])
        if os.path.exists(key):
            with open(key, "rb") as f:
                return pickle.load(f)
        found = self.compile_now(names, arch, header)
        os.makedirs(CUBINS, exist_ok=True)
        with open(key, "wb") as f:
            pickle.dump(found, f)
        return found

    def compile_now(self, names, arch, header):
        prog = ctypes.c_void_p()
        src = f'#include "{header}"\n'.encode()
        assert self.lib.nvrtcCreateProgram(ctypes.byref(prog), src, b"lab.cu", 0, None, None) == 0
        for n in names:
            assert self.lib.nvrtcAddNameExpression(prog, n.encode()) == 0
        opts = [f"--gpu-architecture=sm_{arch}", "-std=c++17", f"-I{SOURCE}", "--ptxas-options=-v"]
        arr = (ctypes.c_char_p * len(opts))(*[o.encode() for o in opts])
        rc = self.lib.nvrtcCompileProgram(prog, len(opts), arr)
        size = ctypes.c_size_t()
        self.lib.nvrtcGetProgramLogSize(prog, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        self.lib.nvrtcGetProgramLog(prog, log)
        if rc:
            raise RuntimeError(log.value.decode())
        lowered = []
        for n in names:
            s = ctypes.c_char_p()
            assert self.lib.nvrtcGetLoweredName(prog, n.encode(), ctypes.byref(s)) == 0
            lowered.append(s.value)
        self.lib.nvrtcGetCUBINSize(prog, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        self.lib.nvrtcGetCUBIN(prog, cubin)
        return cubin.raw, lowered, log.value.decode()


class Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint * 16)]


class Launch(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_uint) for n in ("gx", "gy", "gz", "bx", "by", "bz", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    ]


class Kernel:
    cu = None

    def __init__(self, cubin, name, shared_bytes, cluster):
        self.cluster = cluster
        if Kernel.cu is None:
            Kernel.cu = ctypes.CDLL("libcuda.so.1")
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.cu.cuModuleLoadData(ctypes.byref(self.module), cubin))
        self.check(self.cu.cuModuleGetFunction(ctypes.byref(self.function), self.module, name))
        self.check(self.cu.cuFuncSetAttribute(self.function, 8, shared_bytes))
        if cluster > 8:
            self.check(self.cu.cuFuncSetAttribute(self.function, 14, 1))
        self.shared_bytes = shared_bytes

    @classmethod
    def check(cls, rc):
        if rc:
            s = ctypes.c_char_p()
            cls.cu.cuGetErrorString(rc, ctypes.byref(s))
            raise RuntimeError(f"driver error {rc}: {s.value}")

    def __call__(self, grid, *args):
        import torch

        values = []
        for a in args:
            if a is None:
                values.append(ctypes.c_void_p(0))
            elif isinstance(a, torch.Tensor):
                values.append(ctypes.c_void_p(a.data_ptr()))
            else:
                values.append(ctypes.c_int(a))
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(v) for v in values])
        attribute = Attribute(id=4 if self.cluster else 2)
        attribute.value[:3] = (self.cluster, 1, 1) if self.cluster else (1, 0, 0)
        config = Launch(
            grid,
            1,
            1,
            THREADS,
            1,
            1,
            self.shared_bytes,
            torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(attribute),
            1,
        )
        self.check(self.cu.cuLaunchKernelEx(ctypes.byref(config), self.function, pointers, None))


_built = {}


def names_of(c, dtype="bf16", cell="Tanh"):
    return [f"persistent_{d}<{dtype}, {cell}, {c.template}>" for d in ("forward", "backward")]


def kernels(c, dtype="bf16", cell="Tanh", arch="90a"):
    key = (c, dtype, cell)
    if key not in _built:
        cubin, lowered, _ = Nvrtc().compile(names_of(c, dtype, cell), arch)
        _built[key] = [
            Kernel(cubin, n, c.shared_bytes, c.columns if c.exchange == "ClusterPush" else 0) for n in lowered
        ]
    return _built[key]


def forward(c, pre, weight, h0=None, reset=None, keep=True, out=None, v=None, ring=None, cell="Tanh"):
    import torch

    T, B, H = pre.shape
    out = torch.full_like(pre, float("nan")) if out is None else out
    v = (torch.full_like(pre, float("nan")) if v is None else v) if keep else None
    ring = torch.empty(c.ring_bytes(H), dtype=torch.uint8, device=pre.device) if ring is None else ring
    ring.fill_(255)
    k = kernels(c, "bf16" if pre.dtype == torch.bfloat16 else "fp16", cell)[0]
    k(c.groups * c.columns, pre, weight, h0, reset, out, v, ring, T, B, H, c.tiles)
    return out, v


def backward(c, dh, weight, v, dh_last=None, reset=None, want_dh0=True, out=None, ring=None, cell="Tanh"):
    import torch

    T, B, H = dh.shape
    out = torch.full_like(dh, float("nan")) if out is None else out
    dh0 = torch.full_like(dh[0], float("nan")) if want_dh0 else None
    ring = torch.empty(c.ring_bytes(H), dtype=torch.uint8, device=dh.device) if ring is None else ring
    ring.fill_(255)
    k = kernels(c, "bf16" if dh.dtype == torch.bfloat16 else "fp16", cell)[1]
    k(c.groups * c.columns, dh, weight, dh_last, reset, v, out, dh0, ring, T, B, H, c.tiles)
    return out, dh0


def reference(pre, weight, h0, reset, dy, dlast, cell):
    """Autograd in the dtype of its arguments: h, dpre, dh0."""
    import torch

    f = {"Tanh": torch.tanh, "Softsign": torch.nn.functional.softsign}[cell]
    pre = pre.clone().requires_grad_()
    h0 = (h0 if h0 is not None else torch.zeros_like(pre[0])).clone().requires_grad_()
    h, hs = h0, []
    for t, p in enumerate(pre.unbind(0)):
        if reset is not None:
            h = h.masked_fill(reset[t].bool().unsqueeze(-1), 0)
        h = f(torch.addmm(p, h, weight.t()))
        hs.append(h)
    hs = torch.stack(hs)
    g = torch.autograd.grad([hs, hs[-1]], [pre, h0], [dy, dlast])
    return hs.detach(), g[0], g[1]


def relative(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


def check_one(
    T,
    B,
    H,
    dtype="bfloat16",
    cell="Tanh",
    row_tiles=0,
    scale=1.0,
    with_h0=1,
    with_reset=1,
    exchange="PolledRing",
    blocks=1,
    gain=1.0,
    sms=132,
    seed=0,
):
    import torch

    torch.manual_seed(seed)
    dt = getattr(torch, dtype)
    dev = "cuda"
    c = fit(row_tiles, B, H, exchange, blocks, sms) if row_tiles else choose(B, H)
    pre = (torch.randn(T, B, H, device=dev) * gain).to(dt)
    weight = (torch.randn(H, H, device=dev) * scale / H**0.5).to(dt)
    h0 = torch.rand(B, H, device=dev).mul(2).sub(1).to(dt) if with_h0 else None
    reset = (torch.rand(T, B, device=dev) < 0.2).to(torch.uint8) if with_reset else None
    dy, dlast = torch.randn(T, B, H, device=dev).to(dt), torch.randn(B, H, device=dev).to(dt)
    truth = reference(
        pre.double(), weight.double(), h0.double() if with_h0 else None, reset, dy.double(), dlast.double(), cell
    )
    plain = reference(pre, weight, h0, reset, dy, dlast, cell)
    ours = []
    for _ in range(3):
        h, v = forward(c, pre, weight, h0, reset, cell=cell)
        dpre, dh0 = backward(c, dy, weight, v, dlast, reset, cell=cell)
        torch.cuda.synchronize()
        ours.append((h, dpre, dh0))
    same = all(torch.equal(a, b) for o in ours[1:] for a, b in zip(o, ours[0], strict=True))
    errs = [(relative(a, r), relative(p, r)) for a, p, r in zip(ours[0], plain, truth, strict=True)]
    ok = same and all(e <= 1.5 * q + 1e-9 for e, q in errs)
    print(
        f"{'ok  ' if ok else 'FAIL'} {T}x{B}x{H} {dtype} {cell} scale {scale} h0 {with_h0} reset {with_reset} {c}: "
        + "  ".join(f"{n} {e:.2e}/{q:.2e}" for n, (e, q) in zip(("h", "dpre", "dh0"), errs, strict=True))
        + f" bitwise {same}",
        flush=True,
    )
    return ok


B, F, TANH, SOFT = "'bfloat16'", "'float16'", "'Tanh'", "'Softsign'"
CHECKS = [
    "5,8,64",
    "1,1,8",
    f"1,3,64,{B},{TANH},1",
    "7,13,72",
    f"20,17,256,{F}",
    "33,64,512",
    f"33,64,512,{B},{TANH},2",
    f"33,64,512,{F},{SOFT},4",
    "40,64,1024",
    "40,64,1280",
    "24,256,1280",
    "17,48,1760",
    f"17,250,1000,{B},{TANH},4",
    "12,256,2048",
    "9,128,3584",
    f"50,9,320,{B},{TANH},3,2.0",
    f"30,64,512,{B},{TANH},2,1.0,0,0",
    f"30,31,520,{B},{SOFT},5,1.0,0,1",
    f"1,64,1280,{F}",
    f"2,5,1288,{F},{TANH},5",
    f"20,17,256,{F},{TANH},2,1.0,1,1,'ClusterPush'",
    f"33,64,512,{B},{TANH},4,1.0,1,1,'ClusterPush'",
    f"33,61,1024,{B},{TANH},4,1.0,1,1,'ClusterPush'",
    f"33,130,512,{B},{SOFT},4,1.0,0,1,'ClusterPush'",
    f"1,3,72,{F},{SOFT},3,1.0,1,1,'ClusterPush'",
    f"9,64,328,{F},{TANH},5,1.0,1,0,'ClusterPush'",
    f"40,64,1280,{B},{TANH},5,1.0,1,0,'ClusterPush'",
    f"24,250,1280,{B},{TANH},4,1.0,1,1,'PolledRing',2",
    f"33,61,1024,{B},{TANH},4,1.0,1,1,'ClusterPush',2",
    f"9,256,2048,{F},{TANH},3,1.0,1,1,'PolledRing',2",
    f"24,250,1280,{B},{TANH},4,1.0,1,1,'StagedRing3'",
    f"24,250,1288,{F},{TANH},5,1.0,1,1,'StagedRing3'",
    f"24,61,1024,{B},{SOFT},3,1.0,0,1,'StagedRing2'",
    f"9,256,2048,{F},{TANH},4,1.0,1,1,'StagedRing2'",
    f"24,250,1280,{B},{TANH},4,1.0,1,1,'StagedRing2',2",
    f"24,250,328,{F},{TANH},3,1.0,1,1,'StagedRing2',2",
    f"1,250,1000,{F},{TANH},3,1.0,1,1,'StagedRing3',2",
    f"24,61,1024,{B},{TANH},3,1.0,0,1,'StagedRing3'",
    f"20,64,2048,{B},{TANH},2,1.0,0,1,'PolledRing'",
    f"33,64,512,{B},{TANH},4,1.0,1,1,'PolledRing'",
    f"40,64,512,{B},{TANH},4,1.0,1,1,'ClusterPush',1,6.0",
    f"40,64,512,{B},{TANH},4,1.0,1,1,'PolledRing',1,6.0",
    f"40,64,264,{B},{TANH},2,1.0,1,1,'StagedRing3',1,6.0,20",
    f"5,20,72,{F},{SOFT},2,1.0,1,1,'PolledRing',2",
    f"12,100,520,{B},{TANH},3,1.0,1,1,'PolledRing',2",
]


def check_all():
    failures = sum(not eval(f"check_one({a})") for a in CHECKS)
    print(f"{len(CHECKS)} checks, {failures} failed", flush=True)
    sys.exit(bool(failures))


def graph_time(fn, T, repeats=5):
    import torch

    fn()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        fn()
        b.record()
        torch.cuda.synchronize()
        times.append(a.elapsed_time(b) * 1e3 / T)
    return statistics.median(times)


SHAPES = [
    (16, 512),
    (64, 512),
    (64, 1024),
    (64, 1280),
    (256, 1280),
    (512, 1280),
    (48, 1760),
    (48, 1920),
    (256, 2048),
    (128, 3584),
]


def bench_one(B, H, c=None, T=512, rivals=0):
    import torch

    torch.manual_seed(0)
    c = c or choose(B, H)
    dt, dev = torch.bfloat16, "cuda"
    pre = torch.randn(T, B, H, device=dev).to(dt)
    weight = (torch.randn(H, H, device=dev) / H**0.5).to(dt)
    dy = torch.randn(T, B, H, device=dev).to(dt)
    out, v, dpre = torch.empty_like(pre), torch.empty_like(pre), torch.empty_like(pre)
    ring = torch.empty(c.ring_bytes(H), dtype=torch.uint8, device=dev)
    f = graph_time(lambda: forward(c, pre, weight, out=out, v=v, ring=ring), T)
    f0 = graph_time(lambda: forward(c, pre, weight, out=out, keep=False, ring=ring), T)
    b = graph_time(lambda: backward(c, dy, weight, v, out=dpre, ring=ring), T)
    line = f"{B:4d}x{H:<4d} {c!s:32s} forward {f:6.3f} (no v {f0:6.3f})  backward {b:6.3f}  model {model(c):5.2f}"
    if rivals:
        h = torch.zeros(B, H, device=dev, dtype=dt)
        buf = torch.empty_like(pre)
        wt = weight.t()

        def loop():
            s = h
            for t in range(T):
                torch.addmm(pre[t], s, wt, out=buf[t])
                s = buf[t].tanh_()

        loop()
        torch.cuda.synchronize()
        g = torch.cuda.CUDAGraph()
        with torch.cuda.graph(g):
            loop()
        line += f"  cuBLAS loop {graph_time(g.replay, T):6.3f}"
        for d in (torch.bfloat16, torch.float16):
            rnn = torch.nn.RNN(H, H, device=dev, dtype=d)
            x = pre.to(d)
            with torch.no_grad():
                line += f"  nn.RNN {str(d)[6:]} {graph_time(functools.partial(rnn, x), T, 3):6.3f}"
    print(line, flush=True)


def isolated(code, seconds):
    """Run one expression of this module in a fresh process, so that a hang or a trap costs only its own time."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        r = subprocess.run(
            [sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r}); import kernel_lab as k; k.{code}"],
            timeout=seconds,
            stderr=subprocess.PIPE,
            text=True,
        )
        if r.returncode:
            print(f"FAIL {code}: rc {r.returncode} {r.stderr.strip().splitlines()[-1:]}", flush=True)
    except subprocess.TimeoutExpired:
        print(f"FAIL {code}: over {seconds} s", flush=True)


def sweep(only=""):
    for B, H in SHAPES:
        if only and f"{B}x{H}" not in only:
            continue
        for c in candidates(B, H):
            bench_one(B, H, c)


def bench_all(rivals):
    for B, H in SHAPES:
        bench_one(B, H, None, 512, rivals)


LONG = [(4, 64, 64, "ClusterPush", 132), (1, 64, 64, "PolledRing", 132), (1, 64, 64, "StagedRing3", 8)]


def long_run(T=65536):
    """No drift, and v in the place of pre: forward against float64 over T steps, the error of its last tenth too."""
    import torch

    torch.manual_seed(0)
    for m, B, H, exchange, sms in LONG:
        c = fit(m, B, H, exchange, 1, sms)
        pre = torch.randn(T, B, H, device="cuda").bfloat16()
        weight = (torch.randn(H, H, device="cuda") / H**0.5).bfloat16()
        h, v = forward(c, pre, weight)
        again, v2 = forward(c, (p := pre.clone()), weight, v=p)
        dpre, _ = backward(c, pre, weight, v)
        s, w, truth = torch.zeros(B, H, device="cuda", dtype=torch.double), weight.double().t(), torch.empty_like(pre)
        for t in range(T):
            s = torch.tanh(torch.addmm(pre[t].double(), s, w))
            truth[t] = s
        print(
            f"T {T} {c}: error {relative(h, truth.double()):.2e}, "
            f"last tenth {relative(h[-T // 10 :], truth[-T // 10 :].double()):.2e}, "
            f"v in place {torch.equal(h, again) and torch.equal(v, v2)}, gradient finite {bool(dpre.isfinite().all())}",
            flush=True,
        )


def compile_all(archs=("90a",)):
    """Everything that check, bench and sweep need, so that a machine with a GPU finds it built."""
    wanted = {}
    for B, H in SHAPES:
        for c in candidates(B, H):
            wanted[tuple(names_of(c))] = f"{B}x{H} {c}"
    for a in CHECKS:
        _, B, H, dtype, cell, m, _, _, _, x, n = (list(eval(a)) + [None] * 13)[:11]
        c = fit(m, B, H, x or "PolledRing", n or 1) if m else choose(B, H)
        wanted[tuple(names_of(c, "fp16" if dtype == "float16" else "bf16", cell or "Tanh"))] = a
    for m, B, H, exchange, sms in LONG:
        c = fit(m, B, H, exchange, 1, sms)
        wanted[tuple(names_of(c))] = f"long {c}"
    for arch in archs:
        for names, what in wanted.items():
            t = time.time()
            log = Nvrtc().compile(list(names), arch)[2]
            spills = [s.split(",")[1].split()[0] for s in log.splitlines() if "spill" in s and "bytes" in s]
            print(arch, what, names[0], f"{time.time() - t:.1f} s, spilled bytes", *spills, flush=True)


def main():
    what = sys.argv[1]
    start = time.time()
    if what == "compile":
        compile_all(sys.argv[2:] or ["90a"])
    elif what == "check":
        isolated("check_all()", 120)
    elif what == "bench":
        isolated(f"bench_all({int('rivals' in sys.argv)})", 60)
    elif what == "long":
        isolated("long_run()", 60)
    elif what == "sweep":
        isolated(f"sweep({' '.join(sys.argv[2:])!r})", 120)
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
