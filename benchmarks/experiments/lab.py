"""lab: python lab.py CONFIG... where CONFIG = B,H,reg,shared,blocks,slots,groups,split"""

import sys, math, os, time, statistics

os.chdir(os.path.dirname(os.path.abspath(__file__)))
import numpy as np, torch
from concurrent.futures import ThreadPoolExecutor
from cuda.core import Device, LaunchConfig, Stream, launch, ObjectCode
from cuda.bindings import driver
from compile import compile

dev = Device(0)
dev.set_current()
torch.zeros(1, device="cuda")
COUNT = bool(os.environ.get("COUNT"))


def rup(x, n):
    return (x + n - 1) // n


class Cfg:
    def __init__(s, text, cell="Tanh", t="bf16"):
        s.B, s.H, s.reg, s.sh, s.blocks, s.slots, s.groups, s.split = map(int, text.split(","))
        s.text = text
        s.rows = 8 * s.blocks
        s.tiles = rup(rup(s.B, s.groups), s.rows)
        s.columns = rup(s.H, 64)
        s.names = [
            f"wide_{d}<{t}, {cell}, {s.reg}, {s.sh}, {s.blocks}, {s.slots}, {s.split}>" for d in ("forward", "backward")
        ]

    def smem(s, d):
        n = s.rows
        inputs = 1 if d == 0 else 2
        return (
            2 * 2 * n * 68 * 4
            + 2 * s.sh * 8 * 2048
            + (3 if s.sh > 3 else 4) * inputs * 256 * 16
            + rup(16 * s.slots + 32, 128) * 128
            + 1024
            + s.slots * s.blocks * 2048
        )

    def build(s):
        t0 = time.time()
        code, log = compile(
            tuple(s.names),
            defines=[
                d
                for d in (
                    "ELMAN_COUNT_RETRIES" if COUNT else "",
                    "ELMAN_TRACE" if os.environ.get("TRACE") else "",
                    *os.environ.get("DEFINES", "").split(),
                )
                if d
            ]
            or None,
        )
        s.spill = [l.strip() for l in log.splitlines() if "spill" in l or "C75" in l]
        s.code = ObjectCode.from_cubin(bytes(code.code))
        s.kernels = []
        for d, name in enumerate(s.names):
            k = s.code.get_kernel(code.symbol_mapping[name])
            (st,) = driver.cuKernelSetAttribute(
                driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                s.smem(d),
                k.handle,
                driver.CUdevice(0),
            )
            assert not st, (st, s.smem(d))
            s.kernels.append(k)
        return s

    def retries(s):
        if not COUNT:
            return 0
        st, ptr, size = driver.cuLibraryGetGlobal(driver.CUlibrary(int(s.code.handle)), b"elman_retries")
        assert not st, st
        out = np.zeros(1, np.uint32)
        driver.cuMemcpyDtoH(out.ctypes.data, ptr, 4)
        driver.cuMemsetD32(ptr, 0, 1)
        return int(out[0])

    def clocks(s, T):
        if not os.environ.get("TRACE"):
            return ""
        st, ptr, size = driver.cuLibraryGetGlobal(driver.CUlibrary(int(s.code.handle)), b"elman_trace")
        out = np.zeros(4 * 8 * 4 * 32, np.int64)
        driver.cuMemcpyDtoH(out.ctypes.data, ptr, out.nbytes)
        np.save(
            os.environ.get("OUT", ".")
            + f"/trace-{os.environ.get('DEFINES', '').replace(' ', '_')}-{s.text.replace(',', '_')}.npy",
            out.reshape(4, 8, 4, 32),
        )
        return ""

    def go(s, d, *tensors, T):
        need = 8 * s.groups * s.tiles * rup(s.H, 128) * s.blocks * 2048
        ring = torch.full((need,), 255, dtype=torch.uint8, device="cuda")
        cfg = (
            LaunchConfig(grid=s.groups * s.columns, cluster=s.split, block=640, shmem_size=s.smem(d))
            if s.split > 1
            else LaunchConfig(grid=s.groups * s.columns, block=640, shmem_size=s.smem(d), is_cooperative=True)
        )
        st = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
        launch(
            st,
            cfg,
            s.kernels[d],
            *[0 if x is None else x.data_ptr() for x in (*tensors, ring)],
            *[np.int32(v) for v in (T, s.B, s.H, s.tiles)],
        )


def reference(pre, W, h0, dh, dt):
    pre, W, h0, dh = (x.to(dt) for x in (pre, W, h0, dh))
    pre.requires_grad_()
    h0.requires_grad_()
    h = h0
    hs = []
    for t in range(pre.shape[0]):
        h = torch.tanh(pre[t] + h @ W.t())
        hs.append(h)
    hs = torch.stack(hs)
    g = torch.autograd.grad(hs, (pre, h0), dh)
    return hs.detach(), *g


def check(c, T=24):
    torch.manual_seed(0)
    pre = torch.randn(T, c.B, c.H, device="cuda", dtype=torch.bfloat16)
    W = (torch.randn(c.H, c.H, device="cuda") / c.H**0.5).bfloat16()
    h0 = torch.randn(c.B, c.H, device="cuda").tanh().bfloat16()
    dh = torch.randn_like(pre)
    truth = reference(pre, W, h0, dh, torch.float64)
    plain = reference(pre, W, h0, dh, torch.bfloat16)
    outs = []
    for i in range(3):
        h, v = torch.full_like(pre, 7), torch.full_like(pre, 7)
        c.go(0, pre, W, h0, None, h, v, T=T)
        dpre, dh0 = torch.full_like(pre, 7), torch.full_like(h0, 7)
        c.go(1, dh, W, None, None, v, dpre, dh0, T=T)
        torch.cuda.synchronize()
        outs.append((h, dpre, dh0))
    same = all(torch.equal(a, b) for o in outs[1:] for a, b in zip(o, outs[0]))
    return [
        round(float((o.double() - t).norm() / (p.double() - t).norm()), 2) for o, t, p in zip(outs[0], truth, plain)
    ], same


def bench(c, T=512, n=8):
    pre = torch.randn(T, c.B, c.H, device="cuda", dtype=torch.bfloat16)
    W = (torch.randn(c.H, c.H, device="cuda") / c.H**0.5).bfloat16()
    h, v = torch.empty_like(pre), torch.empty_like(pre)
    dpre = torch.empty_like(pre)
    res = []
    fs = (lambda: c.go(0, pre, W, None, None, h, v, T=T), lambda: c.go(1, pre, W, None, None, v, dpre, None, T=T))
    for f in fs if not os.environ.get("TRACE") else fs[:1]:
        ts = []
        for i in range(n):
            a, b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            a.record()
            f()
            b.record()
            b.synchronize()
            if i > 1:
                ts.append(a.elapsed_time(b) * 1000 / T)
        res.append(statistics.median(ts))
    return res


if __name__ == "__main__":
    cfgs = [Cfg(t) for t in sys.argv[1:]]
    t0 = time.time()

    def safe(c):
        try:
            return c.build()
        except Exception as e:
            print(c.text, "BUILD", repr(e)[:1500])
            return None

    with ThreadPoolExecutor(8) as ex:
        cfgs = [c for c in ex.map(safe, cfgs) if c]
    print("built", round(time.time() - t0, 1))
    for c in cfgs:
        try:
            err, same = check(c) if not os.environ.get("DEFINES") else (0, 0)
            r0 = c.retries()
            f, b = (bench(c) + [0])[:2]
            print(
                f"{c.text:32s} groups {c.groups} x cols {c.columns} x tiles {c.tiles} smem {c.smem(0) // 1024}/{c.smem(1) // 1024} KB  err {err} {'same' if same else 'DIFFER'}  fwd {f:.2f} bwd {b:.2f} us/step  retries {r0} {c.retries()}  {c.clocks(512)}",
                flush=True,
            )
        except Exception as e:
            print(c.text, "FAILED", repr(e)[:300], flush=True)
            if "LAUNCH_FAILED" in repr(e) or "CUDA error" in repr(e):
                break
