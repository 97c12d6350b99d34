"""``elman check``: each way to break a variant is told as what it is. Whole ones: tests/test_model.py."""

from pathlib import Path

import pytest

from elman.cli import main
from elman.contract import CHECKS

EXAMPLE = Path(__file__).parents[1] / "docs/examples/mgu.py"
#: What is written in place of what, and what is said of it then: of which checks, and why.
BROKEN = {
    "the future": ("self.in_proj(x)", "self.in_proj(x.roll(-1, 0))", "no step sees", "something looks ahead"),
    "a mean over time": ("self.in_proj(x)", "self.in_proj(x - x.mean(0))", "no step sees", "depend on the tokens from"),
    "no state out": ("(torch.stack(outputs)), h", "(torch.stack(outputs)), torch.zeros_like(h)", "chunks", "not used"),
    "the first state out": (
        "(torch.stack(outputs)), h",
        "(torch.stack(outputs)), outputs[0]",
        "chunks",
        "that comes out is another",
    ),
    "a count of no state": ("return self.inner_size(dim)\n", "return 0\n", "the state matters", "state_size is 0, but"),
    "resets": ("if reset is not None:", "if False:", "resets equal", "not zeroed before a step of reset"),
    "rows": ("self.in_proj(x)", "self.in_proj(x - x.mean(1, keepdim=True))", "resets equal", "rows of the batch mix"),
    "parameters": ("return 3 * dim * d +", "return 7 + 3 * dim * d +", "are counted", "num_params: at width 16 and"),
    "FLOPs": ("return 2 * (3", "return 2 * (4", "are counted", "flops_per_token: at width 16"),
    "an unused weight": (
        "super().__init__()",
        "super().__init__()\n        self.more = nn.Linear(2, 1)",
        "learns",
        "more",
    ),
    "an undrawn weight": (
        "super().__init__()",
        "super().__init__()\n        self.more = nn.Parameter(torch.empty(9))",
        "every weight is drawn",
        "more is not drawn: draw it in initialize, or where it is made",
    ),
    "autocast": ("pre_c[t] +", "pre_c[t] * (1 + torch.is_autocast_enabled('cpu')) +", "bf16 autocast", "it errs by"),
    "an error": ("note_backend(", "raise ValueError('no\\nway')  # (", "every parameter learns", "ValueError: no way"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_variant_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    right, wrong, what, why = BROKEN[name]
    text = EXAMPLE.read_text()
    assert text.count(right) == 1
    file = tmp_path / "mine.py"
    file.write_text(text.replace(right, wrong))
    assert main(["check", str(file)]) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    reasons = {line: lines[i + 1] for i, line in enumerate(lines) if line.startswith("WRONG")}
    (found,) = [why for line, why in reasons.items() if what in line]
    assert why in found
    assert f"mgu keeps to {len(CHECKS) - len(reasons)} of {len(CHECKS)}; " in last


def test_a_whole_one_keeps_to_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(EXAMPLE), "--options", '{"expansion": 1.5}']) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line[:7] for line in lines] == ["ok     "] * len(CHECKS)
    assert last.startswith(f"mgu keeps to all {len(CHECKS)}; ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["e1,e0"], "MODEL 'e1,e0' is a pattern: check its variants one by one, e1 first"),
        (["e1", "--options", "expansion=2"], "--options 'expansion=2' is no JSON object of options of e1"),
        (["mlp", "--options", '{"wide": 1}'], "is no JSON object of options of mlp, which are: hidden"),
        (["e1", "--options", '{"gate": "x"}'], "--gate 'x' is unknown"),
        (["e99"], "--model 'e99' is unknown"),
    ],
)
def test_bad_input_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], told: str) -> None:
    assert main(["check", *arguments]) == 2
    assert told in capsys.readouterr().err
