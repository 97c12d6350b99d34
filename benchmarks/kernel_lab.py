"""Laboratory for the persistent kernels: compiles them with NVRTC through ctypes, checks and times them.

    python kernel_lab.py check            values against float64, every shape in a process of its own with a time limit
    python kernel_lab.py bench            microseconds a step, beside a cuBLAS loop in a CUDA graph and torch.nn.RNN
    python kernel_lab.py compile          registers and spills, no GPU needed

It talks to the driver and to NVRTC directly, so that the kernels can be tried without the rest of the package.
"""

from __future__ import annotations

import ctypes
import glob
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

SOURCE = os.environ.get("LAB_SOURCE", os.path.join(os.path.dirname(__file__), "..", "elman", "ops", "cuda"))
SHARED_LIMIT = {"90a": 227, "80": 163, "86": 99, "89": 99}
WARPS, THREADS, TILE_ROWS, SLOTS = 8, 384, 8, 8


@dataclass(frozen=True)
class Config:
    """One instantiation and its grid."""

    row_tiles: int
    register_units: int
    shared_units: int
    columns: int
    groups: int
    tiles: int

    @property
    def shared_bytes(self):
        sums = 2 * WARPS * TILE_ROWS * (16 * self.row_tiles + 4) * 4
        return sums + WARPS * self.shared_units * self.row_tiles * 1024


def fit(row_tiles, batch, hidden, sms=132, arch="90a"):
    """The grid and the split of the weights for CTAs of 16 * row_tiles hidden units; None if they do not fit."""
    columns = -(-hidden // (16 * row_tiles))
    if columns > sms:
        return None
    units = -(-hidden // (32 * WARPS))
    budget = (200 if arch == "90a" else 130) - 4 * units - 4 * row_tiles
    register_units = max(1, min(units, budget // (8 * row_tiles)))
    all_tiles = -(-batch // TILE_ROWS)
    tiles = -(-all_tiles // min(sms // columns, all_tiles))
    c = Config(row_tiles, register_units, units - register_units, columns, -(-all_tiles // tiles), tiles)
    return c if c.shared_bytes <= SHARED_LIMIT[arch] * 1024 else None


def model(c, hidden):
    """A rough time of a step in microseconds, to choose among configurations."""
    units = c.register_units + c.shared_units
    mma = units * c.row_tiles * 4 * 6.5
    shared = (WARPS * c.shared_units * c.row_tiles * 1024 + 2 * WARPS * 8 * 16 * c.row_tiles * 4 + units * WARPS * 512 * 2) / 128
    phase = max(mma, shared) + 60
    latency = 1500 + 250 + phase
    return max(c.tiles * phase, latency) / 1900


def choose(batch, hidden, sms=132, arch="90a"):
    fits = [c for c in (fit(m, batch, hidden, sms, arch) for m in (1, 2, 3, 4, 5)) if c]
    return min(fits, key=lambda c: model(c, hidden)) if fits else None


class Nvrtc:
    def __init__(self):
        self.lib = None
        for p in [*sys.path, "/work/tmp/venv/lib/python3.11/site-packages"]:
            found = glob.glob(os.path.join(p, "nvidia", "*", "lib", "libnvrtc.so.1*"))
            if found:
                ctypes.CDLL(glob.glob(os.path.join(os.path.dirname(found[0]), "libnvrtc-builtins.so*"))[0], ctypes.RTLD_GLOBAL)
                self.lib = ctypes.CDLL(sorted(found)[-1])
                break
        assert self.lib, "no libnvrtc found"

    def compile(self, names, arch="90a", header="persistent.cuh"):
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
        return cubin, lowered, log.value.decode()


class Kernel:
    cu = None

    def __init__(self, cubin, name, shared_bytes):
        if Kernel.cu is None:
            Kernel.cu = ctypes.CDLL("libcuda.so.1")
        self.module, self.function = ctypes.c_void_p(), ctypes.c_void_p()
        self.check(self.cu.cuModuleLoadData(ctypes.byref(self.module), cubin))
        self.check(self.cu.cuModuleGetFunction(ctypes.byref(self.function), self.module, name))
        self.check(self.cu.cuFuncSetAttribute(self.function, 8, shared_bytes))
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
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.check(self.cu.cuLaunchCooperativeKernel(self.function, grid, 1, 1, THREADS, 1, 1, self.shared_bytes, stream, pointers))


_built = {}


def kernels(c, dtype="bf16", cell="Tanh", arch="90a"):
    key = (c.row_tiles, c.register_units, c.shared_units, dtype, cell)
    if key not in _built:
        names = [f"persistent_{d}<{dtype}, {cell}, {key[0]}, {key[1]}, {key[2]}>" for d in ("forward", "backward")]
        cubin, lowered, _ = Nvrtc().compile(names, arch)
        _built[key] = [Kernel(cubin, n, c.shared_bytes) for n in lowered]
    return _built[key]


def forward(c, pre, weight, h0=None, reset=None, keep=True, out=None, v=None, ring=None, cell="Tanh"):
    import torch

    T, B, H = pre.shape
    out = torch.full_like(pre, float("nan")) if out is None else out
    v = (torch.full_like(pre, float("nan")) if v is None else v) if keep else None
    ring = torch.empty(SLOTS * B * H * 2, dtype=torch.uint8, device=pre.device) if ring is None else ring
    ring.fill_(255)
    k = kernels(c, "bf16" if pre.dtype == torch.bfloat16 else "fp16", cell)[0]
    k(c.groups * c.columns, pre, weight, h0, reset, out, v, ring, T, B, H, c.tiles)
    return out, v


def backward(c, dh, weight, v, dh_last=None, reset=None, want_dh0=True, out=None, ring=None, cell="Tanh"):
    import torch

    T, B, H = dh.shape
    out = torch.full_like(dh, float("nan")) if out is None else out
    dh0 = torch.full_like(dh[0], float("nan")) if want_dh0 else None
    ring = torch.empty(SLOTS * B * H * 2, dtype=torch.uint8, device=dh.device) if ring is None else ring
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


def check_one(T, B, H, dtype="bfloat16", cell="Tanh", row_tiles=0, scale=1.0, with_h0=1, with_reset=1, seed=0):
    import torch

    torch.manual_seed(seed)
    dt = getattr(torch, dtype)
    dev = "cuda"
    c = fit(row_tiles, B, H) if row_tiles else choose(B, H)
    pre = torch.randn(T, B, H, device=dev).to(dt)
    weight = (torch.randn(H, H, device=dev) * scale / H**0.5).to(dt)
    h0 = torch.rand(B, H, device=dev).mul(2).sub(1).to(dt) if with_h0 else None
    reset = (torch.rand(T, B, device=dev) < 0.2).to(torch.uint8) if with_reset else None
    dy, dlast = torch.randn(T, B, H, device=dev).to(dt), torch.randn(B, H, device=dev).to(dt)
    d = lambda x: None if x is None else x.double()
    truth = reference(pre.double(), weight.double(), d(h0), reset, dy.double(), dlast.double(), cell)
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
    print(f"{'ok  ' if ok else 'FAIL'} {T}x{B}x{H} {dtype} {cell} scale {scale} h0 {with_h0} reset {with_reset} tiles {c.row_tiles},{c.register_units},{c.shared_units} "
          f"grid {c.groups}x{c.columns}x{c.tiles}: " + "  ".join(f"{n} {e:.2e}/{q:.2e}" for n, (e, q) in zip(("h", "dpre", "dh0"), errs, strict=True)) + f" bitwise {same}", flush=True)
    return ok


CHECKS = [
    "5,8,64", "1,1,8", "1,3,64,'bfloat16','Tanh',1", "7,13,72", "20,17,256,'float16'", "33,64,512", "33,64,512,'bfloat16','Tanh',2",
    "33,64,512,'float16','Softsign',4", "40,64,1024", "40,64,1280", "24,256,1280", "17,48,1760", "17,250,1000,'bfloat16','Tanh',4",
    "12,256,2048", "9,128,3584", "50,9,320,'bfloat16','Tanh',3,3.0", "30,64,512,'bfloat16','Tanh',0,1.0,0,0", "30,31,520,'bfloat16','Softsign',5,1.0,0,1",
    "60,16,512,'bfloat16','Tanh',0,8.0", "1,64,1280,'float16'", "2,5,1288,'float16','Tanh',5",
]


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


SHAPES = [(16, 512), (64, 512), (64, 1024), (64, 1280), (256, 1280), (512, 1280), (48, 1760), (48, 1920), (256, 2048), (128, 3584)]


def bench_one(B, H, row_tiles=0, T=512, rivals=0):
    import torch

    torch.manual_seed(0)
    c = fit(row_tiles, B, H) if row_tiles else choose(B, H)
    if c is None:
        print(f"{B}x{H}: does not fit")
        return
    dt, dev = torch.bfloat16, "cuda"
    pre = torch.randn(T, B, H, device=dev).to(dt)
    weight = (torch.randn(H, H, device=dev) / H**0.5).to(dt)
    dy = torch.randn(T, B, H, device=dev).to(dt)
    out, v, dpre = torch.empty_like(pre), torch.empty_like(pre), torch.empty_like(pre)
    ring = torch.empty(SLOTS * B * H * 2, dtype=torch.uint8, device=dev)
    f = graph_time(lambda: forward(c, pre, weight, out=out, v=v, ring=ring), T)
    f0 = graph_time(lambda: forward(c, pre, weight, out=out, keep=False, ring=ring), T)
    b = graph_time(lambda: backward(c, dy, weight, v, out=dpre, ring=ring), T)
    line = f"{B:4d}x{H:<4d} tiles {c.row_tiles},{c.register_units},{c.shared_units} grid {c.groups}x{c.columns}x{c.tiles}  forward {f:6.3f} (no v {f0:6.3f})  backward {b:6.3f}  model {model(c, H):5.2f}"
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
                line += f"  nn.RNN {str(d)[6:]} {graph_time(lambda: rnn(x), T, 3):6.3f}"
    print(line, flush=True)


def isolated(code, seconds):
    """Run one expression of this module in a fresh process, so that a hang or a trap costs only its own time."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        r = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {here!r}); import kernel_lab as k; k.{code}"],
                           timeout=seconds, capture_output=True, text=True)
        print(r.stdout, end="")
        if r.returncode:
            print(f"FAIL {code}: rc {r.returncode} {r.stderr.strip().splitlines()[-1:]}", flush=True)
    except subprocess.TimeoutExpired:
        print(f"FAIL {code}: over {seconds} s", flush=True)


def main():
    what = sys.argv[1]
    start = time.time()
    if what == "compile":
        for arch in sys.argv[2:] or ["90a"]:
            seen = set()
            for B, H in SHAPES:
                for m in (1, 2, 3, 4, 5):
                    c = fit(m, B, H, arch=arch)
                    if not c or (c.row_tiles, c.register_units, c.shared_units) in seen:
                        continue
                    seen.add((c.row_tiles, c.register_units, c.shared_units))
                    t = time.time()
                    names = [f"persistent_{d}<bf16, Tanh, {c.row_tiles}, {c.register_units}, {c.shared_units}>" for d in ("forward", "backward")]
                    log = Nvrtc().compile(names, arch)[2]
                    info = [s.split(" : ")[-1].strip() for s in log.splitlines() if "spill" in s or "Used" in s]
                    print(arch, f"{B}x{H}", c, f"{time.time() - t:.1f} s", *info, sep=" | ")
    elif what == "check":
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda a: isolated(f"check_one({a})", 60), CHECKS))
    elif what == "bench":
        for B, H in SHAPES:
            isolated(f"bench_one({B},{H},0,512,{int('rivals' in sys.argv)})", 60)
    elif what == "sweep":
        for B, H in SHAPES:
            isolated(f"sweep_one({B},{H})", 60)
    print(f"{time.time() - start:.0f} s")


def sweep_one(B, H):
    for m in (1, 2, 3, 4, 5):
        if fit(m, B, H):
            bench_one(B, H, m)


if __name__ == "__main__":
    main()
