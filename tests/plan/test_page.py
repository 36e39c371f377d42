"""Plans as text."""

import pytest

from cogvideox_jax.plan import page


def plan(fits: bool, need: float | None = 120.0) -> dict:
    detail = {
        "tpu": "v5p-128", "mesh": {"data": 1, "fsdp": 64, "sequence": 1}, "samples_per_step": 64, "tokens_per_sample": 17776,
        "remat": "attention", "refused": "no room",
    }  # fmt: skip
    return {
        "fits": fits, "memory_gib_per_chip": need, "memory_limit_gib": 95.74, "compile_s": 61.4, "predicted_step_s": None,
        "detail": detail,
    }  # fmt: skip


def test_what_does_not_fit_says_by_how_much():
    assert page.verdict(plan(False)) == "does not fit: 120 GiB per chip are 24.3 more than the 95.7 there are"
    assert page.verdict(plan(False, None)) == "does not fit: the compiler gave up (no room)"
    assert page.verdict(plan(True, 30.0)) == "fits: 30 of 95.7 GiB per chip"


def test_plans_are_filled_into_a_document():
    document = "# Title\n\n<!-- plans -->\nold\n<!-- /plans -->\n\nrest\n"
    once = page.fill(document, {"b": plan(True, 30.0), "a": plan(False)})
    assert once.startswith("# Title\n\n<!-- plans -->\n")
    assert once.endswith("<!-- /plans -->\n\nrest\n")
    assert "old" not in once
    rows = [line for line in once.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| a", "| b"]
    assert "1x64x1" in rows[2]
    assert "does not fit" in rows[2]
    assert len({row.count("|") for row in rows}) == 1
    assert page.fill(once, {"b": plan(True, 30.0), "a": plan(False)}) == once
    with pytest.raises(ValueError, match="no lines"):
        page.fill("# Title\n", {})


def test_columns_are_aligned():
    assert page.table([("a", 1), ("bcd", 22)], ("x", "n")) == "x     n\na     1\nbcd  22"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.01234, "0.0123"), (12.34, "12.3"), (999.4, "999"), (12345.6, "12,346")]
)
def test_numbers(value, text):
    assert page.number(value) == text
