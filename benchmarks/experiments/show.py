import sys

import numpy as np

t = np.load(sys.argv[1])
tiles = int(sys.argv[2])
base = t[3, 2, 0, 2]
ev = []
names = {0: "P0", 1: "P1", 2: "L", 3: "C"}
lab = {
    (0): {
        **{i: f"chunk{i} full" for i in range(8)},
        **{20 + i: f"chunk{i} issued" for i in range(8)},
        19: "voted",
        16: "mul done",
        17: "sums free",
        18: "sums stored",
    },
    2: {0: "poll start", **{i + 1: f"poll{i}" for i in range(11)}, 16: "issued all"},
    3: {
        0: "top",
        1: "inputs ready",
        **{
            8 + 10 * i + j: f"item{i} " + ["given", "sums", "tanh", "published", "streamed", "wiped"][j]
            for i in range(2)
            for j in range(6)
        },
        2: "sums full",
        3: "published",
        4: "streamed",
        5: "fetched",
    },
}
for r in range(4):
    for s in range(1, 6):
        for tl in range(tiles):
            for e in range(32):
                v = t[r, s, tl, e]
                if v > 0:
                    ev.append((v - base, names[r], s, tl, lab[0 if r < 2 else r].get(e, e)))
ev.sort()
lim = int(sys.argv[3])
for e in ev:
    if -300 <= e[0] <= lim and e[1] != "P1":
        print(*e)
