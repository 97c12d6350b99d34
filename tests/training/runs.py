"""How the tests begin a run, go on with it, and read what it wrote."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from elman.mixers import MixerConfig, mixer_config
from elman.training.config import RunConfig
from elman.training.run import RunFolder, open_run
from elman.training.start import resume_run, start_run

E1 = (mixer_config("e1")(),)
# Its power iteration's vector must be saved too.
CAPPED = (mixer_config("e1")(constraint="spectral_norm"),)


def start(config: RunConfig, mixers: tuple[MixerConfig, ...] = E1) -> tuple[int, str]:
    output = io.StringIO()
    return start_run(config, mixers, Console(file=output, width=100)), output.getvalue()


def resume(config: RunConfig, **changes: Any) -> tuple[int, str]:
    saved, model = open_run(config.out).read_config()  # type: ignore[arg-type]
    output = io.StringIO()
    code = resume_run(replace(saved, resume=config.out, **changes), model.mixers, Console(file=output, width=100))
    return code, output.getvalue()


def losses(path: Path | None) -> dict[int, float]:
    assert path is not None
    return {row["step"]: row["loss"] for row in RunFolder(path).read_metrics() if "loss" in row}
